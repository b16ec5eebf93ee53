"""A plan, a finished study, a pick and an explanation, as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from fivefold.display.static import LEGEND, console, number, table
from fivefold.metrics import METRICS, show
from fivefold.quantity import Quantity
from fivefold.study.analysis import change, word
from fivefold.study.picks import Pick, ratios_by, tested

COLUMNS = ("decode", "ttft", "memory", "size", "energy", "money", "agreement", "perplexity", "accuracy", "flips")
IF_ASKED = ("accuracy", "flips")


def honesty(machine: Any, out: Console | None = None) -> None:
    """The machine in four lines, and what is modelled on it and how uncertain."""
    out = out or console()
    gpus = ", ".join(machine.gpus) or "no accelerator"
    out.print(Text(f"{machine.cpu}, {machine.cores} cores, {show(machine.ram, 'byte')}, {gpus}", style="bold"))
    for row in machine.doctor():
        if row.name == "calibration" and row.fix:
            out.print(Text(f"  its rates were taken {row.text}: predictions are rough → {row.fix}", style="yellow"))
    rates = machine.rates
    bandwidth = rates.get(f"bandwidth.{machine.cores}") or rates.get("bandwidth.1")
    gemm = rates.get("gemm.float32")
    if bandwidth and gemm:
        rate = f"{show(gemm.value, 'FLOP')}/s in fp32"
        out.print(f"  reads {show(bandwidth.value, 'byte')}/s, computes {rate} (measured)")
    for row in machine.doctor():
        if row.topic == "power":
            out.print(Text(f"  {row.name}: {row.text}"))
            if row.fix:
                out.print(Text(f"    → {row.fix}", style="yellow"))


def _reasons(dropped: Mapping[str, str]) -> dict[str, list[str]]:
    """What is said of each, its own name left out -> of whom it is said."""
    found: dict[str, list[str]] = {}
    for name, why in dropped.items():
        found.setdefault(why.removeprefix(f"{name} "), []).append(name)
    return found


def plan(planned: Any, out: Console | None = None) -> None:
    """A `study.plan.Plan`."""
    out = out or console()
    out.print(Text("plan", style="bold"))
    count = f"{planned.recipes:,.0f}" if planned.recipes < 1e9 else f"10^{math.log10(planned.recipes):.0f}"
    out.print(f"  searches {', '.join(planned.techniques)}: up to {count} recipes")
    for why, names in _reasons({n: why for n, why in planned.dropped.items() if "(" not in n}).items():
        out.print(Text(f"  not searched: {', '.join(names)}: {why}", style="dim"))
    out.print(
        f"  parent about {show(planned.baseline.value, 's')}, each trial about {show(planned.trial.value, 's')};"
        f" {planned.trials.value:.0f} trials in {show(planned.time.value, 's')}"
    )
    out.print(Text("  predicted: ").append_text(number(planned.energy)).append(
        f", {show(planned.disk.value, 'byte')} of disk   (~ modelled before anything was measured)", style="dim"))


def result(study: Any) -> None:
    """What `optimize` leaves: picks against the parent, what backfired, where everything is."""
    from fivefold.study.explain import explain
    from fivefold.study.picks import picks

    out = console()
    trials, parent = study.trials, study.parent
    chosen = picks(trials, study.goal)
    if parent is not None and chosen:
        _picks(chosen, parent, str(study.meta.get("apart") or ""), out)
    explained = explain(trials)
    _backfired(explained, out)
    for number_, repaid in explained.paybacks.items():
        pick = next((p for p in chosen if p.trial.number == number_), None)
        if pick:
            parts = [f"{k}: {show(q.value, '1')} tokens" if q.value is not None else f"{k}: {q.reason}"
                     for k, q in repaid.items()]
            out.print(f"payback of {pick.role} (trial {number_})  " + "   ".join(parts))
    out.print(f"report     {study.folder / 'report.html'}")
    out.print(f"artifacts  {study.folder / 'artifacts'}")
    if chosen:
        out.print(f"ship it    fivefold ship {study.folder} --to my-model")


def nothing_fits(error: Any, folder: Any) -> None:
    """A `study.feasible.NothingFits`: the nearest misses, and where the report is."""
    out = console()
    if error.misses:
        out.print(Text("nearest misses", style="bold"))
        _side_by_side([(_missed(miss), miss.trial, {}) for miss in error.misses[:3]], out)
    out.print(f"report     {folder}/report.html")


def _missed(miss: Any) -> str:
    return ", ".join(f"{limit} by {gap:.0%}" for limit, gap in zip(miss.limits, miss.excess, strict=True))


def _picks(chosen: Sequence[Pick], parent: Any, apart: str, out: Console) -> None:
    arms = [("parent", parent, {}), *((p.role, p.trial, p.against) for p in chosen)]
    _side_by_side(arms, out)
    for line in ratio_lines([p.trial for p in chosen], apart):
        out.print(Text(line, style="dim"))


def ratio_lines(trials: Sequence[Any], apart: str = "") -> list[str]:
    """How the ratios of each trial but the parent were obtained, a line per way. `apart` says why not in turn."""
    found: dict[str, list[str]] = {}
    for trial in (t for t in trials if t.recipe != "parent"):
        found.setdefault(ratios_by(trial, apart), []).append(str(trial.number))
    return [
        said.replace(": ", f" of trial{'s' * (len(numbers) > 1)} {', '.join(numbers)}: ", 1)
        for said, numbers in found.items()
    ]


def _side_by_side(arms: Sequence[tuple[str, Any, Mapping[str, Quantity]]], out: Console) -> None:
    """One column per trial, one row per metric: fits a narrow terminal. `arms` is (heading, trial, ratios)."""
    grid = table("", *(heading for heading, _, _ in arms))
    grid.add_row("trial", *(str(trial.number) for _, trial, _ in arms))
    grid.add_row("recipe", *(Text(trial.recipe, style="green") for _, trial, _ in arms))
    for name in (n for n in COLUMNS if n not in IF_ASKED or any(n in trial.measurement for _, trial, _ in arms)):
        grid.add_row(name, *(_cell(trial.measurement.get(name), ratios.get(name)) for _, trial, ratios in arms))
    out.print(grid)
    out.print(Text(LEGEND, style="dim"))
    for trial in {trial.number: trial for _, trial, _ in arms}.values():
        if said := tested(trial):
            out.print(Text(said, style="dim"))


def _cell(quantity: Quantity | None, ratio: Quantity | None = None) -> Text:
    text = number(quantity)
    if ratio is not None and ratio.value is not None:
        text.append(f"  {ratio.value:.2g}x", style="bold")
        if ratio.low is not None and ratio.high is not None and ratio.high > ratio.low:
            text.append(f" [{ratio.low:.2g}, {ratio.high:.2g}]", style="dim")
    return text


def pick(picked: Any) -> None:
    """A `verbs.Picked`."""
    out = console()
    out.print(Text(f"trial {picked.trial.number}: {picked.trial.recipe}", style="bold green"))
    grid = table("metric", "value", "against the parent")
    for name in METRICS:
        if name in picked.trial.measurement:
            grid.add_row(name, number(picked.trial.measurement[name]), number(picked.against.get(name)))
    out.print(grid)
    for line in (*ratio_lines([picked.trial]), tested(picked.trial)):
        if line:
            out.print(Text(line, style="dim"))
    out.print(Text(LEGEND, style="dim"))


def explanation(explained: Any) -> None:
    """A `study.explain.Explanation`."""
    out = console()
    metrics = [m for m in METRICS if any(e.metric == m for e in explained.effects)]
    out.print(Text("effect of each technique (what it adds to a recipe; green is better)", style="bold"))
    grid = table("technique", *metrics, right=metrics)
    for name in dict.fromkeys(e.technique for e in explained.effects):
        found = {e.metric: e for e in explained.effects if e.technique == name}
        grid.add_row(name, *(_effect(found.get(m)) for m in metrics))
    out.print(grid)
    out.print(Text("* by regression over all trials; without it: paired trials that differ in this only", style="dim"))
    shown = [e for e in explained.interactions if word(e) != "as promised"]
    out.print(Text("interactions", style="bold"))
    for e in shown[:12]:
        out.print(f"  {e.technique}: {word(e)} on {e.metric} ({change(e).value:+.1%} beyond what they promise apart)")
    if not shown:
        out.print(f"  {len(explained.interactions)} measured, none beyond its interval")
    _backfired(explained, out)
    out.print(Text("prediction error (median)  ", style="bold").append(
        "  ".join(f"{k} {show(q.value, 'fraction')}" for k, q in explained.prediction.items()) or "none yet"))
    ranks = [f"{k} {q.value:.2f} (n={q.n})" if q.value is not None else f"{k}: {q.reason}"
             for k, q in explained.screen.items()]
    out.print(Text("screen to final, Spearman  ", style="bold").append("  ".join(ranks)))
    if explained.failures:
        out.print(Text("failures  ", style="bold").append(", ".join(f"{n} {k}" for k, n in explained.failures.items())))


def _effect(effect: Any) -> Text:
    if effect is None:
        return Text("")
    shown = change(effect)
    mark = "*" if effect.method == "regression" else ""
    style = "green" if effect.high is not None and effect.high < 0 else "red" if effect.worse else ""
    value = shown.value or 0.0
    return Text(f"{value:+.3f}{mark}" if shown.unit == "nat/token" else f"{value:+.1%}{mark}", style=style)


def _backfired(explained: Any, out: Console) -> None:
    if explained.backfired:
        out.print(Text("what backfired here", style="bold"))
        for found in explained.backfired:
            out.print(Text(f"  {found.sentence}", style="red"))
