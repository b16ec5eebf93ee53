"""The verbs: what a person does with Fivefold, one public function each; the command line calls them one to one.

They join the rooms (study, report, serve) and return plain values; drawing is `display`'s. Every name is also
`fivefold.<name>`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fivefold.errors import RecipeError, UserError
from fivefold.quantity import Measurement, Quantity
from fivefold.space import Dimension, dimensions, nearest

if TYPE_CHECKING:
    from fivefold.machine import Machine
    from fivefold.model import Model
    from fivefold.recipe import Technique
    from fivefold.study.compare import Comparison
    from fivefold.study.explain import Explanation
    from fivefold.study.plan import Plan
    from fivefold.study.request import Finished
    from fivefold.study.ship import Shipped
    from fivefold.study.study import Study
    from fivefold.study.trial import Trial
    from fivefold.tasks.choice import ChoiceSet
    from fivefold.tokenizer import Tokenizer

FULL_TOKENS, WINDOW = 2048, 512


def doctor(refresh: bool = False) -> Machine:
    """The calibrated machine; `.doctor()` gives its rows. `refresh` calibrates again (under 20 s)."""
    from fivefold.machine import Machine

    return Machine.load(refresh=refresh)


def _choices(
    budget: str, minimize: str, allowance: str, workload: str, text: str, country: str, sampler: str, seed: int,
    task: str | Sequence[str], items: int,
) -> dict[str, Any]:
    from fivefold.budget import Allowance, Budget, objectives

    return {
        "budget": Budget.parse(budget), "objectives": objectives(minimize), "allowance": Allowance.parse(allowance),
        "workload": workload, "text": text, "country": country, "sampler": sampler, "seed": seed,
        "tasks": (task,) if isinstance(task, str) else tuple(task), "items": items,
    }


def plan(
    model: str | Path, *, budget: str = "", minimize: str = "latency,energy,size", allowance: str = "30min",
    workload: str = "chat", text: str = "encyclopedia", country: str = "world", sampler: str = "fivefold",
    seed: int = 0, task: str | Sequence[str] = (), items: int = 100,
) -> Plan:
    """What `optimize` would do with these arguments; spends nothing."""
    choices = _choices(budget, minimize, allowance, workload, text, country, sampler, seed, task, items)
    from fivefold.model import load
    from fivefold.study.plan import plan as planned

    return planned(load(model), **choices)


def optimize(
    model: str | Path, *, out: str | Path, budget: str = "", minimize: str = "latency,energy,size",
    allowance: str = "30min", workload: str = "chat", text: str = "encyclopedia", country: str = "world",
    sampler: str = "fivefold", seed: int = 0, memory: str = "", task: str | Sequence[str] = (), items: int = 100,
    events: Callable[[Any], None] | None = None,
) -> Study:
    """Search, resume or finish the study in `out`; leaves its report there.

    `task` names labelled sets (piqa) or .jsonl files; every trial answers `items` of each and gets an `accuracy`.
    `memory` ("1GB") caps each process of a trial: above it the trial is out of memory and the search goes on.
    Raises Infeasible when nothing measured meets the budget (the report is written all the same), Busy when another
    process works on `out`, UserError for what is wrong with the arguments.
    """
    choices = _choices(budget, minimize, allowance, workload, text, country, sampler, seed, task, items)
    from fivefold.budget import size
    from fivefold.model import load
    from fivefold.study.optimize import optimize as search

    study = search(load(model), Path(out), events=events, memory=size(memory) if memory else None, **choices)
    report(study)
    study.pick()
    return study


def report(study: Study) -> list[Path]:
    """Write report.html, report.md and trials.csv of a study into its folder."""
    from fivefold.report import write_report
    from fivefold.study.analysis import analysis

    trials, meta = study.trials, study.meta
    return write_report(study.folder, trials, meta, analysis(trials, study.goal, str(meta.get("apart") or "")))


@dataclass(frozen=True, kw_only=True)
class Picked:
    """One trial, and its measurements as multiples of the parent's."""

    trial: Trial
    against: Mapping[str, Quantity]


def train(
    model: str | Path, *, data: str | Path, out: str | Path = "", budget: str = "", recipe: str = "", task: str = "",
    test: str | Path = "", template: str = "", epochs: float = 1.0, steps: int = 0, tokens_per_step: int = 1024,
    patience: int = 0, items: int = 200, seed: int = 0, events: Callable[[Any], None] | None = None,
) -> Finished:
    """Fine-tune on a file of examples within a budget ("memory<=2GB, time<=20min"), or go on with the run in `out`
    (default: runs/ and the name of the file).

    `recipe` names the way (`lora(rank=8)`); without one, the ways are forecast and one that fits is chosen. `task`
    "accuracy" judges labelled rows, or names a set (sst2); `test` is a file of rows to judge by instead of the held-out
    ones, `items` of them. `epochs` or `steps` is how long, unless `patience` checks of the held-out rows bring nothing.
    Limits hold for training and judging together. Raises Infeasible when no way fits, Busy, DataError, NotFinite,
    OutOfMemory.
    """
    from fivefold.budget import TrainingBudget
    from fivefold.model import TrainPlan, load
    from fivefold.study.request import Request
    from fivefold.study.train import train as trained

    request = Request(
        model=load(model), data=Path(data), out=Path(out or Path("runs") / Path(data).stem),
        budget=TrainingBudget.parse(budget), recipe=recipe, task=task, test=Path(test) if test else None,
        template=template or TrainPlan.template, epochs=epochs, steps=steps, tokens_per_step=tokens_per_step,
        patience=patience, items=items, seed=seed,
    )
    return trained(request, events or (lambda event: None))


def pick(study: str | Path, *, budget: str = "", by: str = "knee") -> Picked:
    """Choose from stored trials; an empty budget is the study's own. Raises Infeasible with the one limit to relax."""
    from fivefold.budget import Budget
    from fivefold.study.picks import against
    from fivefold.study.study import Study

    opened = Study.open(study)
    chosen = opened.pick(Budget.parse(budget) if budget else None, by)
    return Picked(trial=chosen, against=against(chosen, opened.parent) if opened.parent else {})


def explain(study: str | Path) -> Explanation:
    """Effects, interactions, what backfired, payback and prediction errors of a study."""
    from fivefold.study.explain import explain as explained
    from fivefold.study.study import Study

    return explained(Study.open(study).trials)


def measure(
    model: str | Path, *, workload: str = "chat", text: str = "encyclopedia", country: str = "world",
    recipe: str = "", rounds: int = 5, quality: bool = True, task: str | Sequence[str] = (), items: int = 100,
    attack: int = 0,
) -> Measurement:
    """Five resources (in a fresh process), log-loss on held-out text and accuracy on tasks of a model, under run-time
    techniques. `quality` False leaves out the log-loss. `attack` items of each task are attacked, at about a hundred
    passes each."""
    from fivefold.errors import Misfit
    from fivefold.meters.interleaved import Interleaved, Job
    from fivefold.model import load
    from fivefold.recipe import Recipe
    from fivefold.study.quality import questions, victims
    from fivefold.tokenizer import Tokenizer
    from fivefold.workload import Workload

    loaded, parsed = load(model), Recipe.parse(recipe)
    if parsed.build.techniques:
        raise Misfit(f"measure takes run-time techniques only, and {parsed.build} changes the artifact; use optimize")
    served = parsed.apply(loaded)
    tokenizer = Tokenizer(loaded.tokenizer_file)
    traffic = Workload.load(workload, tokenizer)
    tasks = (task,) if isinstance(task, str) else tuple(task)
    sets, targets = questions(tasks, items), victims(tasks, attack)
    with Interleaved([Job(model=served, workload=traffic)], country=country) as alone:
        measured = alone.run(rounds)[0]
    if quality:
        measured = measured.merged(_log_loss(served, text))
    return measured.merged(_accuracy(served, tokenizer, sets, targets)) if sets else measured


def _accuracy(
    model: Model, tokenizer: Tokenizer, sets: Sequence[ChoiceSet], targets: Sequence[ChoiceSet]
) -> Measurement:
    from fivefold.engines import open_session
    from fivefold.study.quality import attacked, scored
    from fivefold.tasks.choice import answer

    session = open_session(model)
    try:
        found = scored([answer(session, tokenizer, s) for s in sets])
        return found.merged(attacked(session, tokenizer, targets).measurement) if targets else found
    finally:
        session.close()


def _log_loss(model: Model, text: str) -> Measurement:
    """Loss, perplexity and calibration of a model by itself: it is its own reference, agreement and KL say nothing."""
    from fivefold.engines import open_session
    from fivefold.tasks.fidelity import Reference
    from fivefold.tasks.text import windows
    from fivefold.tokenizer import Tokenizer

    sample = windows(Tokenizer(model.tokenizer_file), text, "evaluation", FULL_TOKENS, WINDOW)
    session = open_session(model)
    try:
        found = Reference.record(session, sample, k=1).itself().measurement
    finally:
        session.close()
    kept = {name: found[name] for name in ("loss", "perplexity", "ece")}
    return Measurement(kept, {"text": text, "ece_floor": found.context["ece_floor"]})


def compare(
    a: str | Path, b: str | Path, *, task: str = "fidelity", margin: float = 0.01, items: int = 64,
    workload: str = "chat", text: str = "encyclopedia", country: str = "world", attack: int = 0,
) -> Comparison:
    """Paired verdict on B against A, quality by subgroup, and their resources in interleaved rounds. `attack` items of
    a labelled task are attacked, at about a hundred passes each."""
    from fivefold.model import load
    from fivefold.study.compare import compare as compared
    from fivefold.tokenizer import Tokenizer
    from fivefold.workload import Workload

    first, second = load(a), load(b)
    traffic = Workload.load(workload, Tokenizer(first.tokenizer_file))
    return compared(
        first, second, task=task, margin=margin, items=items, workload=traffic, text=text, country=country,
        attack=attack,
    )


def ship(study: str | Path, *, to: str | Path, budget: str = "", trial: int | None = None) -> Shipped:
    """Copy the recommended (or given) trial's artifact of a study, or the model of a training run, to `to`, measured
    again. Raises Departure and leaves nothing."""
    from fivefold.study.ship import ship_trial
    from fivefold.study.ship_trained import is_run, ship_run

    if is_run(Path(study)):
        if budget or trial is not None:
            raise UserError(f"{study} is a training run, which has one model; leave --budget and --trial out")
        return ship_run(Path(study), Path(to))

    return ship_trial(Path(study), Path(to), budget=budget, number=trial)


def serve(
    model: str | Path, *, host: str = "127.0.0.1", port: int = 8080, key: str | None = None, queue: int = 16
) -> None:
    """Serve a model, artifact or GGUF file over an OpenAI-compatible API until stopped."""
    from fivefold.serve import serve as served

    served(model, host, port, key, max_queue=queue)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One technique of the catalogue, as its file declares it; `record` is what was measured with and without it."""

    name: str
    stage: str
    summary: str
    text: str
    lowers: Mapping[str, str]
    may_raise: Sequence[str]
    needs: Sequence[str]
    breaks: Sequence[str]
    runtime: bool
    fields: Sequence[Dimension]
    headline: str
    record: str

    @property
    def facts(self) -> list[str]:
        """What is declared, a line each."""
        found = [
            f"lowers: {', '.join(f'{k} ({v})' for k, v in self.lowers.items()) or 'nothing directly'}",
            f"may raise: {', '.join(self.may_raise) or 'nothing'}", f"needs: {', '.join(self.needs) or 'nothing'}",
            f"breaks: {', '.join(self.breaks) or 'nothing'}",
            "acts at run time only" if self.runtime else "changes the artifact",
        ]
        found += [f"its source reports, elsewhere: {self.headline}"] * bool(self.headline)
        return found + [f"measured: {self.record}"] * bool(self.record)


def catalogue(name: str | None = None) -> list[Entry]:
    """Every technique in life-cycle order, or one of them. Raises RecipeError for an unknown name."""
    from fivefold.recipe import catalogue as techniques

    known = techniques()
    if name is not None and name not in known:
        hint = nearest(name, known)
        near = f"did you mean {hint}?" if hint else "see: fivefold catalogue"
        raise RecipeError(f"there is no technique {name!r}; {near}")
    return [_entry(n, t) for n, t in known.items() if name in (None, n)]


def _entry(name: str, technique: type[Technique]) -> Entry:
    from fivefold.study.records import told

    text = inspect.getdoc(inspect.getmodule(technique)) or ""
    return Entry(
        name=name, stage=technique.__module__.split(".")[-2], summary=text.splitlines()[0] if text else "", text=text,
        lowers=technique.lowers, may_raise=technique.may_raise, needs=sorted(t.value for t in technique.needs),
        breaks=sorted(t.value for t in technique.breaks), runtime=technique.runtime, fields=dimensions(technique),
        headline=technique.headline, record=told(name),
    )


def catalogue_page(entries: Sequence[Entry]) -> str:
    """The catalogue as Markdown; `docs/catalogue.md` is this text, checked by a test."""
    lines = ["# Catalogue", "", "Generated by `fivefold catalogue --markdown`; edit the techniques, not this page.", ""]
    for stage in dict.fromkeys(e.stage for e in entries):
        lines += [f"## {stage.capitalize()}", ""]
        for entry in (e for e in entries if e.stage == stage):
            lines += [f"### {entry.name}", "", entry.text, ""]
            lines += [*(f"- {fact}" for fact in entry.facts), ""]
            if entry.fields:
                lines += ["| field | legal | default | what |", "|---|---|---|---|"]
                lines += [f"| `{d.name}` | {legal(d, '`')} | {default(d, '`')} | {d.help} |" for d in entry.fields]
                lines += [""]
    return "\n".join(lines)


def legal(dimension: Dimension, quote: str = "") -> str:
    """The values a field takes, each between quotes."""
    if dimension.legal:
        return ", ".join(f"{quote}{v}{quote}" for v in dimension.legal)
    if dimension.range:
        return f"{dimension.range.low:g} to {dimension.range.high:g}"
    return "true, false" if dimension.kind == "bool" else dimension.kind


def default(dimension: Dimension, quote: str = "") -> str:
    return "required" if dimension.required else f"{quote}{dimension.default}{quote}"
