"""Picks: three trials of the front worth a look instead of thirty, and each against the parent.

    smallest    fewest bytes on disk
    greenest    least energy per token
    safest      most agreement with the parent, among trials no worse than it on every objective

All three lie within the budget. `recommended` is the knee of the front (`pareto.knee`). A trial that was measured in
turn with the parent (`in_turn`) shows those ratios; others show the quotient of two separate measurements with the
widest interval these allow. Peak memory and bytes on disk do not drift and are always quotients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fivefold.metrics import METRICS
from fivefold.quantity import Quantity
from fivefold.study.pareto import Goal, coordinate, front, knee, values_of
from fivefold.study.trial import Trial

AGAINST = ("latency", "decode", "ttft", "prefill", "memory", "size", "energy", "money")


@dataclass(frozen=True, kw_only=True)
class Pick:
    """`against`: metric -> how many times the parent's value."""

    role: str
    trial: Trial
    why: str
    against: Mapping[str, Quantity]


def picks(trials: Sequence[Trial], goal: Goal) -> list[Pick]:
    """The recommendation first; a trial that fills several roles is listed once, with all of them."""
    parent = next((t for t in trials if t.recipe == "parent"), None)
    if parent is None:
        return []
    values = values_of(parent)
    # The parent may lie on its own front; recommending it would say "change nothing" three times.
    found = [t for t in front(trials, goal, values) if t is not parent]
    allowed = [t for t in trials if t is not parent and values_of(t) and goal.budget.met(values_of(t), values)]
    roles: dict[int, list[tuple[str, str]]] = {}

    def add(trial: Trial | None, role: str, why: str) -> None:
        if trial is not None:
            roles.setdefault(trial.number, []).append((role, why))

    add(knee(found, goal), "recommended", "the knee of the front")
    add(_least(allowed, "size"), "smallest", "fewest bytes within the budget")
    add(_least(allowed, "energy"), "greenest", "least energy per token within the budget")
    better = [t for t in allowed if _no_worse(t, parent, goal.objectives)]
    add(_least(better, "agreement"), "safest", "closest to the parent and no worse on any objective")
    known = {t.number: t for t in trials}
    return [
        Pick(role=", ".join(r for r, _ in named), trial=known[number], why="; ".join(w for _, w in named),
             against=against(known[number], parent))
        for number, named in roles.items()
    ]


def against(trial: Trial, parent: Trial) -> dict[str, Quantity]:
    """metric -> trial / parent, for the metrics both have: in turn where that was measured."""
    apart = {name: quotient(trial.measurement.get(name), parent.measurement.get(name)) for name in AGAINST}
    found = {name: trial.paired.get(name) or apart[name] for name in AGAINST}
    return {name: q for name, q in found.items() if q is not None and q.value is not None}


def ratios_by(trial: Trial, apart: str = "") -> str:
    """How the ratios of `against` were obtained, as one sentence; `apart` says why not in turn, where it is known."""
    context = trial.paired.context
    if len(trial.paired):
        rounds, requests = context["rounds"], context["requests"]
        some = f"{requests} request{'s' * (requests != 1)}"
        return f"ratios: measured in turn with the parent, median over {rounds} rounds of {some}"
    why = f"{context['outcome']} when measured in turn: {context['sentence']}" if context else apart
    return "ratios: from separate measurements, minutes apart" + (why and f" ({why})")


def tested(trial: Trial) -> str:
    """What McNemar's test on the same items says of a trial against the parent; "" where no task was answered."""
    context = trial.measurement.context
    if trial.recipe == "parent" or "mcnemar_p" not in context:
        return ""
    n = trial.measurement["accuracy"].n
    return f"accuracy of trial {trial.number} on {n} items of {context['task']}: McNemar p = {context['mcnemar_p']:.2g}"


def quotient(a: Quantity | None, b: Quantity | None) -> Quantity | None:
    """a / b with the widest interval their own allow; None when one is missing."""
    if a is None or b is None or a.value is None or not b.value:
        return None
    low = a.low / b.high if a.low is not None and b.high else None
    high = a.high / b.low if a.high is not None and b.low else None
    return Quantity(value=a.value / b.value, unit="x", method=a.method, n=min(a.n, b.n), low=low, high=high)


def _least(trials: Sequence[Trial], metric: str) -> Trial | None:
    known = [(coordinate(metric, v), t.number, t) for t in trials if (v := t.value(metric)) is not None]
    return min(known)[2] if known else None


def _no_worse(trial: Trial, parent: Trial, objectives: Sequence[str]) -> bool:
    sides = [(trial.value(n), parent.value(n)) for n in objectives if METRICS[n].resource != "quality"]
    return all(
        a is not None and b is not None and coordinate(n, a) <= coordinate(n, b)
        for n, (a, b) in zip((n for n in objectives if METRICS[n].resource != "quality"), sides, strict=True)
    )
