"""Analysis: a study's picks, effects, interactions, payback and prediction errors as the plain JSON the report reads.

The shape is the report's (`report.analysis`); what the records do not hold is left out with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fivefold.errors import Infeasible
from fivefold.metrics import METRICS, show
from fivefold.quantity import Quantity
from fivefold.study.explain import Effect, Explanation, explain
from fivefold.study.feasible import infeasible
from fivefold.study.pareto import Goal, front, values_of
from fivefold.study.picks import picks, ratios_by, tested
from fivefold.study.trial import Outcome, Trial

LEAST = 0.02
"""An interaction smaller than this (2 % or 0.02) with no interval is not called good or bad."""


def analysis(trials: Sequence[Trial], goal: Goal, apart: str = "") -> dict[str, Any]:
    """`apart` says why the picks were not measured in turn with the parent, or is ""."""
    parent = next((t for t in trials if t.recipe == "parent" and t.outcome is Outcome.MEASURED), None)
    values = values_of(parent) if parent else {}
    found = front(trials, goal, values)
    explained = explain(trials)
    out: dict[str, Any] = {
        "parent": parent.number if parent else None, "front": [t.number for t in found],
        "picks": [
            {"role": p.role, "number": p.trial.number, "why": p.why, "ratios": ratios_by(p.trial, apart),
             "tested": tested(p.trial),
             "against_parent": {n: q.to_json() for n, q in p.against.items()}}
            for p in picks(trials, goal)
        ],
        "effects": [
            {"technique": e.technique, "metric": e.metric, "change": change(e).to_json()} for e in explained.effects
        ],
        "interactions": _interactions(explained),
        "backfired": [
            {"what": b.effect.technique, "metric": b.effect.metric, "change": change(b.effect).to_json(),
             "sentence": b.sentence}
            for b in explained.backfired
        ],
        "payback": list(_paybacks(trials, explained.paybacks)),
        "predictor": {name: q.to_json() for name, q in explained.prediction.items()},
        "missing": {
            "interactions": "no pair was measured alone, together and without both",
            "backfired": "no technique surely raised what it should lower",
            "effects": "fewer than two trials were measured",
        },
    }
    rho = explained.screen.get("kl")
    if rho is not None and rho.value is not None:
        out["screen"] = {"metric": "kl", "spearman": rho.to_json()}
    elif rho is not None:
        out["missing"]["screen"] = rho.reason
    if not found:
        out["infeasible"] = str(_why(trials, goal, values))
    return out


def _why(trials: Sequence[Trial], goal: Goal, values: Mapping[str, float | None]) -> Infeasible:
    return infeasible(trials, goal.budget, values)


def change(effect: Effect) -> Quantity:
    """The effect as a relative change (-0.31 is "31 % less"), or a difference for fractions and nats."""
    sign = 1.0 if METRICS[effect.metric].better == "lower" else -1.0
    differs = METRICS[effect.metric].unit in ("fraction", "nat/token")

    def turn(place: float | None) -> float | None:
        if place is None:
            return None
        return sign * place if differs else float(2.0 ** (sign * place) - 1)

    low, high = turn(effect.low), turn(effect.high)
    if low is not None and high is not None and low > high:
        low, high = high, low
    unit = METRICS[effect.metric].unit if differs else "fraction"
    return Quantity(value=turn(effect.value), unit=unit, method="measured", n=effect.n, low=low, high=high,
                    reason="" if effect.method == "paired" else "additive regression over all measured trials")


def _interactions(explained: Explanation) -> list[dict[str, Any]]:
    alone = {(e.technique, e.metric): e for e in explained.effects}
    out = []
    for pair in explained.interactions:
        a, _, b = pair.technique.partition(" + ")
        first, second = alone.get((a, pair.metric)), alone.get((b, pair.metric))
        if first is None or second is None:
            continue
        promised = Effect(technique=pair.technique, metric=pair.metric, value=first.value + second.value, low=None,
                          high=None, n=pair.n, method="paired")
        together = Effect(technique=pair.technique, metric=pair.metric, value=promised.value + pair.value, low=None,
                          high=None, n=pair.n, method="paired")
        out.append({
            "a": a, "b": b, "metric": pair.metric, "apart": change(promised).to_json(),
            "together": change(together).to_json(), "verdict": word(pair),
        })
    return out


def word(pair: Effect) -> str:
    """Better or worse together than apart, when the interval (or, with one pair, a margin of 2 %) says so."""
    low = pair.low if pair.low is not None else pair.value - LEAST
    high = pair.high if pair.high is not None else pair.value + LEAST
    return "better together" if high < 0 else "worse together" if low > 0 else "as promised"


def _paybacks(trials: Sequence[Trial], found: Mapping[int, Mapping[str, Quantity]]) -> Any:
    known = {t.number: t for t in trials}
    for number, by_resource in found.items():
        for resource, tokens in by_resource.items():
            said = f"repaid after {show(tokens.value, '1')} tokens" if tokens.value is not None else tokens.reason
            made = known[number].made.get(resource)
            yield {
                "number": number, "resource": resource, "tokens": tokens.to_json(), "sentence": said,
                **({"cost": made.to_json()} if made is not None else {}),
            }
