"""Trial records -> the plain data behind the page: every number formatted once, here, with its method and interval.

A metric is shown in one unit everywhere (the one that fits its median), so that columns and axes can be read down.
The methods carry a mark: ● measured, = counted, ~ modelled.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fivefold.budget import Budget
from fivefold.errors import BudgetError
from fivefold.metrics import METRICS, RESOURCES, scale
from fivefold.quantity import Quantity
from fivefold.report import analysis as parts
from fivefold.study.trial import Outcome, Trial

MARKS = {"measured": "●", "counted": "=", "modelled": "~"}
PHASES = ("build", "screen", "measure", "quality", "in turn", "overhead")
HASHES = ("model", "machine", "search space")
"""Settings that identify the study exactly; a reader wants them at the end."""
AXES = {
    "compute": ("latency", "request", "ttft", "decode"), "memory": ("memory", "gpu_memory", "size"),
    "energy": ("energy", "carbon"), "money": ("money",), "network": ("network", "request_bytes"),
    "quality": ("agreement", "kl", "loss", "perplexity", "accuracy"),
}
"""The metric that stands for a resource in the parallel coordinates: the first that was measured."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A metric's one unit on the page: value / factor, in `unit`."""

    factor: float
    unit: str

    def text(self, value: float | None) -> str:
        if value is None:
            return "–"
        return number(value / self.factor)


def number(value: float) -> str:
    """Three significant digits, thousands separated, a real minus sign."""
    if value != 0 and (abs(value) < 1e-4 or abs(value) >= 1e7):
        text = f"{value:.2e}"
    else:
        digits = 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))) if value else 0
        text = f"{value:,.{max(0, digits)}f}"
    return text.replace("-", "−")


def payload(trials: Sequence[Trial], meta: Mapping[str, Any], analysis: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the page and the text draw from, as JSON without a NaN."""
    measured = [t for t in trials if t.outcome is Outcome.MEASURED]
    settings = _mapping(meta.get("settings")) or meta
    shown = units(trials)
    parent = _parent(trials, analysis)
    base = {name: parent.value(name) for name in METRICS} if parent else {}
    budget, trouble = _budget(str(settings.get("budget") or ""))
    return {
        "title": str(meta.get("name") or settings.get("model") or "study"),
        "settings": _settings(settings, meta),
        "metrics": {name: _metric(name, shown[name]) for name in METRICS if name in shown},
        "axes": [name for choice in AXES.values() if (name := _first(choice, measured))],
        "trials": [_trial(t, shown, budget, base) for t in trials],
        "counts": dict(Counter(str(t.outcome) for t in trials)),
        "parent": parent.number if parent else None,
        "bounds": _bounds(budget, base, shown), "budget_trouble": trouble,
        "front": parts.numbers(analysis, "front"),
        "infeasible": str(analysis.get("infeasible") or ""),
        "honesty": honesty(measured), "machine": machine(_mapping(meta.get("machine"))),
        "contexts": [*contexts(measured), *([k, str(settings[k])] for k in HASHES if settings.get(k))],
        "marks": MARKS, "spend": spend(trials),
        **{name: _part(analysis, name) for name in parts.LISTS},
        "predictor": _errors(analysis), "screen": _screen(analysis),
    }


def units(trials: Iterable[Trial]) -> dict[str, Shown]:
    """The unit of every metric that has at least one value on any rung."""
    values: dict[str, list[float]] = {}
    for trial in trials:
        for rung in (trial.measurement, trial.screen, trial.predicted):
            for name in rung:
                if name in METRICS and (value := _finite(rung.value(name))) is not None:
                    values.setdefault(name, []).append(abs(value))
    return {name: Shown(*scale(statistics.median(v), METRICS[name].unit)) for name, v in values.items()}


def cell(quantity: Quantity | Mapping[str, Any], shown: Shown | None = None) -> dict[str, Any]:
    """{v, lo, hi, t, i, m, n, r}: value and interval in the base unit, their texts, method, samples, reason."""
    q = quantity if isinstance(quantity, Quantity) else _quantity(quantity)
    value, low, high = _finite(q.value), _finite(q.low), _finite(q.high)
    form = shown or Shown(*scale(abs(value or 0.0), q.unit))
    reason = q.reason or ("the value is not finite" if q.value is not None and value is None else "")
    spread = low is not None and high is not None and high > low
    out = {
        "v": value, "lo": low, "hi": high, "t": form.text(value), "u": form.unit, "m": q.method, "n": q.n,
        "i": f"{form.text(low)} to {form.text(high)}" if spread else "", "r": reason,
    }
    return {k: v for k, v in out.items() if v not in (None, "")}


def change(quantity: Mapping[str, Any], metric: str = "") -> dict[str, Any]:
    """A change with its sign: relative ("−31 %"), a difference of a fraction ("−2 points"), or of another unit."""
    unit = str(quantity.get("unit", "fraction"))
    points = metric in METRICS and METRICS[metric].unit == "fraction"
    form = Shown(0.01, "points" if points else "%") if unit == "fraction" else Shown(1.0, unit)
    out = cell(quantity, form)
    out["f"] = form.factor
    if out.get("v", 0) > 0:
        out["t"] = f"+{out['t']}"
    return out


def honesty(measured: Sequence[Trial]) -> list[dict[str, Any]]:
    """Per metric: methods, samples per number, the typical half-width of the interval, and the notes given."""
    rows = []
    for name in METRICS:
        found = [q for t in measured if (q := t.measurement.get(name)) is not None]
        known = [q for q in found if _finite(q.value) is not None]
        if not found:
            continue
        widths = [(q.high - q.low) / 2 / abs(q.value) for q in known
                  if q.value and q.low is not None and q.high is not None]
        reasons = Counter(q.reason for q in found if q.reason)
        rows.append({
            "metric": name, "label": METRICS[name].label, "resource": METRICS[name].resource,
            "methods": sorted({q.method for q in known}), "n": sorted({q.n for q in known}), "known": len(known),
            "of": len(measured), "width": _finite(statistics.median(widths)) if widths else None,
            "notes": [reason for reason, _ in reasons.most_common(2)],
        })
    order = (*RESOURCES, "quality")
    return sorted(rows, key=lambda r: order.index(r["resource"]))


def machine(facts: Mapping[str, Any]) -> list[list[str]]:
    """Rows (name, text) of the machine card; empty when the machine was not recorded."""
    rows = [["processor", f"{facts['cpu']}, {facts.get('cores', '?')} cores"]] if facts.get("cpu") else []
    if facts.get("isa"):
        rows.append(["instructions", " ".join(map(str, facts["isa"]))])
    if (ram := _finite(facts.get("ram"))) is not None:
        factor, unit = scale(ram, "byte")
        rows.append(["memory", f"{number(ram / factor)} {unit}"])
    if facts.get("gpus"):
        rows.append(["accelerator", ", ".join(map(str, facts["gpus"]))])
    rows += [[key, str(facts[key])] for key in ("os", "date") if facts.get(key)]
    for name, rate in _mapping(facts.get("rates")).items():
        if isinstance(rate, Mapping) and rate.get("value") is not None:
            c = cell(rate)
            rows.append([str(name), f"{MARKS[c['m']]} {c['t']} {c['u']}" + (f" ({c['i']})" if "i" in c else "")])
    return rows


def contexts(measured: Iterable[Trial]) -> list[list[str]]:
    """What the measurements were taken with: engines, workload, rounds, and how many rounds other load disturbed."""
    taken = [t.measurement.context for t in measured]
    engines = Counter(
        f"{e['engine']} ({e.get('version', '?')})" if isinstance(e, Mapping) and "engine" in e else str(e)
        for c in taken if (e := c.get("engine"))
    )
    rows = [["engine", ", ".join(f"{name}: {n} trials" for name, n in engines.most_common())]] if engines else []
    for key in ("task", "workload", "requests", "batch", "rounds", "tokens", "country", "prices"):
        found = Counter(str(c[key]) for c in taken if key in c)
        if found:
            rows.append([key, ", ".join(v for v, _ in found.most_common(4))])
    dates = sorted(str(c["date"])[:16] for c in taken if c.get("date"))
    if dates:
        rows.append(["measured", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"])
    disturbed = [c["disturbed_kept"] for c in taken if isinstance(c.get("disturbed_kept"), int)]
    if disturbed:
        rows.append(["rounds kept although other load disturbed them", str(sum(disturbed))])
    return rows


def spend(trials: Iterable[Trial]) -> dict[str, Any]:
    """Seconds by phase, and the other sums the trials carry (`energy.J`, `money.USD`)."""
    seconds: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for trial in trials:
        for key, value in trial.spent.items():
            if (amount := _finite(value)) is None:
                continue
            if "." not in key:
                seconds[key] += amount  # type: ignore[assignment]
            elif key in ("energy.J", "money.USD"):
                others[key] += amount  # type: ignore[assignment]
    order = [*(p for p in PHASES if p in seconds), *sorted(set(seconds) - set(PHASES))]
    return {"phases": [[p, seconds[p]] for p in order], "total": sum(seconds.values()), **others}


def _metric(name: str, shown: Shown) -> dict[str, Any]:
    m = METRICS[name]
    return {"label": m.label, "better": m.better, "resource": m.resource, "factor": shown.factor, "unit": shown.unit}


def _trial(trial: Trial, shown: Mapping[str, Shown], budget: Budget, base: Mapping[str, Any]) -> dict[str, Any]:
    done = trial.outcome is Outcome.MEASURED
    values = {name: trial.value(name) for name in METRICS}
    return {
        "number": trial.number, "recipe": trial.recipe, "outcome": str(trial.outcome), "sentence": trial.sentence,
        "failed": trial.outcome.failed, "coverage": list(trial.coverage), "artifact": trial.artifact or "",
        "fits": budget.met(values, base) if done and len(budget.limits) else None,
        "values": _cells(trial.measurement, shown) if done else {},
        "screen": _cells(trial.screen, shown), "predicted": _cells(trial.predicted, shown),
        "made": {k: cell(q) for k, q in trial.made.items()},
        "spent": sum(s for k, s in trial.spent.items() if "." not in k and math.isfinite(s)),
    }


def _cells(rung: Mapping[str, Quantity], shown: Mapping[str, Shown]) -> dict[str, Any]:
    return {name: cell(q, shown.get(name)) for name, q in rung.items() if name in METRICS}


def _settings(settings: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, str]:
    """What was asked for, in words: the inputs as they were typed, without the hashes that identify them."""
    plain = {k: v for k, v in settings.items() if meta.get("name") is None or k not in HASHES}
    merged = {**plain, **_mapping(meta.get("inputs"))}
    return {str(k): str(v) for k, v in merged.items() if isinstance(v, str | int | float) and str(v)}


def _part(analysis: Mapping[str, Any], name: str) -> dict[str, Any]:
    """{"rows": [...], "why": "..."}; quantities inside become cells, changes get their sign."""
    rows, why = parts.entries(analysis, name)
    return {"rows": [{k: _value(k, v, str(row.get("metric"))) for k, v in row.items()} for row in rows], "why": why}


def _value(key: str, value: Any, metric: str = "") -> Any:
    if isinstance(value, Mapping):
        if "value" in value:
            return change(value, metric) if key in ("change", "apart", "together") else cell(value)
        return {str(k): _value(str(k), v) for k, v in value.items()}
    if isinstance(value, float):
        return _finite(value)
    return value if isinstance(value, str | int | None) else str(value)


def _errors(analysis: Mapping[str, Any]) -> dict[str, Any]:
    found, why = parts.table(analysis, "predictor")
    cells = {name: change(q) for name, q in found.items() if isinstance(q, Mapping) and name in METRICS}
    rows = [[name, {**c, "t": c.get("t", "").removeprefix("+")}] for name, c in cells.items()]
    return {"rows": rows, "why": why or ("" if rows else parts.SHAPE.format("predictor"))}


def _screen(analysis: Mapping[str, Any]) -> dict[str, Any]:
    found, why = parts.table(analysis, "screen")
    q = found.get("spearman")
    return {"metric": str(found.get("metric", "")), "spearman": cell(q) if isinstance(q, Mapping) else None, "why": why}


def _parent(trials: Sequence[Trial], analysis: Mapping[str, Any]) -> Trial | None:
    wanted = analysis.get("parent")
    return next((t for t in trials if t.outcome is Outcome.MEASURED
                 and (t.number == wanted if isinstance(wanted, int) else t.recipe == "parent")), None)


def _budget(text: str) -> tuple[Budget, str]:
    try:
        return Budget.parse(text), ""
    except BudgetError as error:
        return Budget(), str(error)


def _bounds(budget: Budget, base: Mapping[str, Any], shown: Mapping[str, Shown]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for limit in budget:
        bound = limit.bound(base)
        text = shown[limit.metric].text(bound) + " " + shown[limit.metric].unit if limit.metric in shown else ""
        out[limit.metric] = {"limit": bound, "upper": limit.upper, "text": str(limit), "shown": text}
    return out


def _first(choice: Iterable[str], measured: Iterable[Trial]) -> str | None:
    return next((name for name in choice if any(_finite(t.value(name)) is not None for t in measured)), None)


def _quantity(data: Mapping[str, Any]) -> Quantity:
    known = ("value", "unit", "method", "n", "low", "high", "reason")
    return Quantity(**{"unit": "1", "method": "modelled", **{k: data[k] for k in known if k in data}})


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _finite(value: Any) -> float | None:
    plain = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if plain else None
