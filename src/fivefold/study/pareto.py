"""Pareto: which trials no other trial beats, how much they win together, and which one sits at the knee.

`a` dominates `b` when it is no worse in every objective and better in one. The front is what nothing dominates. Its
*hypervolume* (Zitzler & Thiele 1999) is the volume between the front and a reference point worse than all of it: the
one number by which fronts can be compared. Limits come first (constraint domination, Deb et al. 2002): a trial that
meets the budget beats one that does not, and of two that do not the one that misses by less wins.

Objectives have different units, so points are taken in *coordinates* where smaller is better: log2 of the value, sign
turned where higher is better, so that a step of 1 is "twice as good"; fractions and nats, which may be 0, stay linear.
Everything here is a pure function of the records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fivefold.budget import Budget
from fivefold.metrics import METRICS
from fivefold.study.trial import Outcome, Trial

Point = tuple[float, ...]
Values = Mapping[str, float | None]
_LINEAR = ("fraction", "nat/token")
ON_TASKS = ("accuracy", "label_loyalty", "probability_loyalty", "flips", "choice_ece")
"""Metrics that exist only where a task was named, and only once a trial was measured in full."""
UNSCREENED = (*ON_TASKS, "ece")
"""Metrics that no screen gives: of few answers a calibration error is mostly its own bias."""
_ATTACK = "an attack asks about each item a hundred times; use fivefold compare A B --task sst2 --attack 50"
ASIDE = {
    "after_attack": _ATTACK, "attack_queries": _ATTACK,
    "worst_group_kl": "groups need more tokens than a trial scores; use fivefold compare A B",
}
"""Metrics that no trial of a study has -> why, and what measures them."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a study is for: the objectives to trade off, within the budget."""

    objectives: tuple[str, ...]
    budget: Budget = field(default_factory=Budget)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Objectives and limited metrics, each once."""
        return tuple(dict.fromkeys((*self.objectives, *(limit.metric for limit in self.budget))))

    def of_screen(self) -> Goal:
        """The goal by what a screen knows. It answers no task: the KL divergence stands in for a task's metric among
        the objectives, and limits on such metrics wait for the measurement. So for a calibration error."""
        objectives = tuple(dict.fromkeys("kl" if name in UNSCREENED else name for name in self.objectives))
        return Goal(objectives, Budget(tuple(limit for limit in self.budget if limit.metric not in UNSCREENED)))


def coordinate(metric: str, value: float) -> float:
    """Smaller is better; one step is a factor of two, or one unit for fractions and nats."""
    sign = 1.0 if METRICS[metric].better == "lower" else -1.0
    return sign * (value if METRICS[metric].unit in _LINEAR else math.log2(max(value, 1e-30)))


def point(values: Values, objectives: Sequence[str]) -> Point | None:
    """The coordinates, or None when one objective is unknown."""
    found = [values.get(name) for name in objectives]
    if any(v is None or not math.isfinite(v) for v in found):
        return None
    return tuple(coordinate(name, v) for name, v in zip(objectives, found, strict=True) if v is not None)


def values_of(trial: Trial) -> dict[str, float | None]:
    """What was measured; empty unless the trial was measured in full."""
    return {name: trial.value(name) for name in trial.measurement} if trial.outcome is Outcome.MEASURED else {}


def dominates(a: Point, b: Point) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def nondominated(points: Sequence[Point]) -> list[int]:
    """Indices of the points nothing dominates; of equal points the first."""
    return [
        i for i, p in enumerate(points)
        if not any(dominates(q, p) or (q == p and j < i) for j, q in enumerate(points))
    ]


def front(trials: Sequence[Trial], goal: Goal, parent: Values) -> list[Trial]:
    """Measured trials within the budget that no other such trial dominates, by the first objective."""
    kept = [
        (p, t) for t in trials
        if (p := point(values_of(t), goal.objectives)) is not None and goal.budget.met(values_of(t), parent)
    ]
    kept.sort(key=lambda pair: (pair[0], pair[1].number))
    return [kept[i][1] for i in nondominated([p for p, _ in kept])]


def ranks(points: Sequence[Point], excess: Sequence[float]) -> list[int]:
    """Layer of each point under constraint domination: 0 is the front, 1 the front without it, and so on."""

    def beats(i: int, j: int) -> bool:
        a, b = max(0.0, excess[i]), max(0.0, excess[j])
        return a < b if a or b else dominates(points[i], points[j])

    layer = [-1] * len(points)
    rest, level = set(range(len(points))), 0
    while rest:
        now = {i for i in rest if not any(beats(j, i) for j in rest if j != i)}
        for i in now:
            layer[i] = level
        rest -= now
        level += 1
    return layer


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Volume dominated by `points` and bounded by `reference`, exactly.

    Two objectives: a sweep. More: slices along the last objective, each a smaller problem (Knowles 2002; While et al.
    2006), O(n^(d-1) log n), which is instant for the tens of points of a study.
    """
    inside = [p for p in points if all(x < r for x, r in zip(p, reference, strict=True))]
    inside = [inside[i] for i in nondominated(inside)]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(inside)[0]
    if len(reference) == 2:
        return _sweep(inside, reference)
    inside.sort(key=lambda p: p[-1])
    total = 0.0
    for i, p in enumerate(inside):
        above = inside[i + 1][-1] if i + 1 < len(inside) else reference[-1]
        if above > p[-1]:
            total += (above - p[-1]) * hypervolume([q[:-1] for q in inside[: i + 1]], reference[:-1])
    return total


def _sweep(points: Sequence[Point], reference: Point) -> float:
    total, top = 0.0, reference[1]
    for x, y in sorted(points):
        if y < top:
            total += (reference[0] - x) * (top - y)
            top = y
    return total


def contributions(points: Sequence[Point], reference: Point) -> list[float]:
    """Volume that is lost when the point leaves."""
    whole = hypervolume(points, reference)
    return [whole - hypervolume([*points[:i], *points[i + 1 :]], reference) for i in range(len(points))]


def scaled(points: Sequence[Point], margin: float = 0.1) -> tuple[list[Point], Point]:
    """Points stretched so that each objective spans 0 to 1, and the reference `1 + margin` in each."""
    lows = [min(column) for column in zip(*points, strict=True)]
    spans = [(max(c) - low) or 1.0 for c, low in zip(zip(*points, strict=True), lows, strict=True)]
    moved = [tuple((x - low) / s for x, low, s in zip(p, lows, spans, strict=True)) for p in points]
    return moved, (1.0 + margin,) * len(lows)


def knee(trials: Sequence[Trial], goal: Goal) -> Trial | None:
    """The trial of a front that alone dominates the most: the box between it and the reference is largest.

    Objectives are stretched to equal spans first, so that the choice does not depend on units. The ends of a front win
    in one objective only and so have small boxes; the knee has the largest. None for an empty front.
    """
    placed = [(p, t) for t in trials if (p := point(values_of(t), goal.objectives)) is not None]
    if not placed:
        return None
    moved, reference = scaled([p for p, _ in placed])
    boxes = [hypervolume([p], reference) for p in moved]
    best = max(range(len(placed)), key=lambda i: (boxes[i], -placed[i][1].number))
    return placed[best][1]
