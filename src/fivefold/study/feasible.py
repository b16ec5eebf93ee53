"""Feasible: when nothing meets the budget, what comes nearest and which one limit to relax.

A *miss* is a measured trial with the limits it fails. Relaxing limit L alone helps if some trial meets all the others:
the value to relax it to is the best L among those trials. Of all such limits the one that moves by the smallest
fraction is the advice; when no single limit is enough, the nearest miss says which ones stand in the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fivefold.budget import Budget, Limit
from fivefold.errors import Infeasible
from fivefold.metrics import METRICS, show
from fivefold.study.pareto import Values, values_of
from fivefold.study.trial import Outcome, Trial


@dataclass(frozen=True, slots=True)
class Miss:
    """`excess[i]` is the fraction by which `limits[i]` is missed."""

    trial: Trial
    limits: tuple[Limit, ...]
    excess: tuple[float, ...]

    @property
    def worst(self) -> float:
        return max(self.excess)


@dataclass(frozen=True, slots=True)
class Relaxation:
    """With `limit` at `value` (base unit) and every other limit kept, `trial` would do."""

    limit: Limit
    value: float
    excess: float
    trial: Trial


class NothingFits(Infeasible):
    """Infeasible with its data: the `misses`, nearest first, and the `relaxation` if one limit is enough."""

    def __init__(self, sentence: str, misses: Sequence[Miss], relaxation: Relaxation | None) -> None:
        super().__init__(sentence)
        self.misses, self.relaxation = tuple(misses), relaxation


def misses(trials: Sequence[Trial], budget: Budget, parent: Values) -> list[Miss]:
    """Measured trials outside the budget, nearest first."""
    found = []
    for trial in trials:
        if trial.outcome is not Outcome.MEASURED:
            continue
        gaps = [(limit, limit.excess(values_of(trial), parent)) for limit in budget]
        failed = [(limit, math.inf if gap is None else gap) for limit, gap in gaps if gap is None or gap > 0]
        if failed:
            found.append(Miss(trial, tuple(limit for limit, _ in failed), tuple(gap for _, gap in failed)))
    return sorted(found, key=lambda m: (m.worst, len(m.limits), m.trial.number))


def relaxation(found: Sequence[Miss]) -> Relaxation | None:
    """The one limit whose smallest move lets a trial in; None when every trial fails two or more."""
    single = [m for m in found if len(m.limits) == 1 and math.isfinite(m.worst)]
    if not single:
        return None
    best = min(single, key=lambda m: (m.worst, m.trial.number))
    limit = best.limits[0]
    value = values_of(best.trial)[limit.metric]
    assert value is not None
    return Relaxation(limit, value, best.worst, best.trial)


def infeasible(trials: Sequence[Trial], budget: Budget, parent: Values) -> NothingFits:
    """The error to raise when no measured trial meets the budget."""
    found = misses(trials, budget, parent)
    if not found:
        return NothingFits("no trial was measured within the allowance; allow more time", found, None)
    one = relaxation(found)
    if one is None:
        near = found[0]
        names = " and ".join(str(limit) for limit in near.limits)
        return NothingFits(
            f"no measured recipe meets {budget}; the nearest, {near.trial.recipe}, misses {names}: relax both, or allow"
            " more time", found, None,
        )
    unit = METRICS[one.limit.metric].unit
    return NothingFits(
        f"no measured recipe meets {budget}; relax {one.limit} to {show(one.value, unit)} ({one.excess:.0%} off) and"
        f" {one.trial.recipe} fits, or allow more time", found, one,
    )
