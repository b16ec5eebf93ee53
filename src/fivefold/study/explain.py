"""Explain: what each technique did on this machine, which pairs help or hurt each other, what backfired, what it cost.

Effects are differences in coordinates (`pareto`): log2, so that +1 is "twice as much of it" and effects of techniques
add; negative is better. Where two measured recipes differ in one technique only, the effect is the mean of those paired
differences. Elsewhere it is the coefficient of an additive regression over all measured trials. The interval is a
bootstrap over pairs or trials; with a single pair it comes from the intervals of its two measurements.

A pair of techniques interacts by what A+B does beyond what A and B promise apart:

    interaction = y(A+B) - y(A) - y(B) + y(neither)

Payback divides the cost to make by the saving per token against the parent. The Spearman correlation of screen and
final measurement says how far the screen may be trusted to rank. Only measured trials enter; all of it is a pure
function of the records.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fivefold.meters.ledger import Cost, paybacks
from fivefold.metrics import METRICS
from fivefold.quantity import Quantity
from fivefold.recipe import Recipe, Technique, catalogue
from fivefold.study.pareto import coordinate
from fivefold.study.predictor import errors
from fivefold.study.trial import Outcome, Trial

Array = NDArray[np.float64]
RESAMPLES = 400
RIDGE = 1e-3
SIGN_OF = {"compute": "latency", "memory": "memory", "energy": "energy", "money": "money", "network": "network"}
"""The metric by which a resource is judged."""
SHOWN = ("latency", "ttft", "memory", "size", "energy", "money", "network", "agreement", "kl", "accuracy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """Of one technique (or a pair) on one metric, in coordinates: negative is better. `n` pairs or trials."""

    technique: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    method: Literal["paired", "regression"]

    @property
    def ratio(self) -> float | None:
        """How many times the metric's value; None for metrics that are differences (fractions, nats)."""
        if METRICS[self.metric].unit in ("fraction", "nat/token"):
            return None
        return float(2.0 ** (self.value if METRICS[self.metric].better == "lower" else -self.value))

    @property
    def worse(self) -> bool:
        """Surely worse: the whole interval lies above zero."""
        return self.low is not None and self.low > 0


@dataclass(frozen=True, slots=True)
class Backfire:
    """A technique made worse what it should lower, here."""

    effect: Effect
    resource: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """`paybacks` maps a trial's number to tokens by resource; `screen` maps a metric to Spearman's rho."""

    effects: tuple[Effect, ...]
    interactions: tuple[Effect, ...]
    backfired: tuple[Backfire, ...]
    paybacks: Mapping[int, Mapping[str, Quantity]]
    screen: Mapping[str, Quantity]
    prediction: Mapping[str, Quantity]
    failures: Mapping[str, int]


def explain(trials: Sequence[Trial], metrics: Sequence[str] = SHOWN) -> Explanation:
    """Everything above, for the metrics that were measured."""
    table = _Table(trials)
    known = [m for m in metrics if table.values(m)]
    found = [e for m in known for e in table.effects(m)]
    pairs = [e for m in known for e in table.interactions(m)]
    parent = next((t for t in table.trials if t.recipe == "parent"), None)
    return Explanation(
        effects=tuple(found), interactions=tuple(sorted(pairs, key=lambda e: -abs(e.value))),
        backfired=tuple(backfired(found)),
        paybacks={
            t.number: paybacks(Cost.of(t.made), parent.measurement, t.measurement)
            for t in table.trials if parent is not None and t is not parent and t.made
        },
        screen={m: rank_correlation(trials, m) for m in ("kl", "agreement", "loss")},
        prediction=errors(trials), failures=_failures(trials),
    )


class _Table:
    """Measured trials, and which techniques with which settings each one holds."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.trials = [t for t in trials if t.outcome is Outcome.MEASURED]
        self.parts: list[frozenset[Technique]] = [frozenset(Recipe.parse(t.recipe)) for t in self.trials]
        self.index = {parts: i for i, parts in enumerate(self.parts)}
        self.names = [n for n in catalogue() if any(n == t.name for parts in self.parts for t in parts)]

    def place(self, i: int, metric: str) -> float | None:
        value = self.trials[i].value(metric)
        return None if value is None or not math.isfinite(value) else coordinate(metric, value)

    def values(self, metric: str) -> list[tuple[int, float]]:
        return [(i, y) for i in range(len(self.trials)) if (y := self.place(i, metric)) is not None]

    def effects(self, metric: str) -> list[Effect]:
        fitted = self._regression(metric)
        out = []
        for name in self.names:
            pairs = self._pairs(name, metric)
            if pairs:
                out.append(self._paired(name, metric, pairs))
            elif name in fitted:
                out.append(fitted[name])
        return out

    def _pairs(self, name: str, metric: str) -> list[tuple[int, int]]:
        """(with, without) indices of trials that differ in this technique only."""
        found = []
        for i, parts in enumerate(self.parts):
            rest = frozenset(t for t in parts if t.name != name)
            j = self.index.get(rest)
            if len(rest) < len(parts) and j is not None and None not in (self.place(i, metric), self.place(j, metric)):
                found.append((i, j))
        return found

    def _paired(self, name: str, metric: str, pairs: Sequence[tuple[int, int]]) -> Effect:
        gaps = np.array([_sure(self.place(i, metric)) - _sure(self.place(j, metric)) for i, j in pairs])
        if len(gaps) > 1:
            ends: tuple[float | None, float | None] = _bootstrap(len(gaps), lambda rows: float(gaps[rows].mean()))
        else:
            ends = self._ends(*pairs[0], metric)
        return Effect(technique=name, metric=metric, value=float(gaps.mean()), low=ends[0], high=ends[1], n=len(gaps),
                      method="paired")

    def _ends(self, i: int, j: int, metric: str) -> tuple[float | None, float | None]:
        """The widest difference the two measurements' intervals allow."""
        sides = []
        for k in (i, j):
            q = self.trials[k].measurement[metric]
            if q.low is None or q.high is None:
                return None, None
            sides.append(sorted((coordinate(metric, q.low), coordinate(metric, q.high))))
        return sides[0][0] - sides[1][1], sides[0][1] - sides[1][0]

    def _regression(self, metric: str) -> dict[str, Effect]:
        """Effects of all techniques together on log2 of the metric, each present or absent."""
        rows = self.values(metric)
        if len(rows) < 3:
            return {}
        x = np.array([[1.0, *(float(any(t.name == n for t in self.parts[i])) for n in self.names)] for i, _ in rows])
        y = np.array([v for _, v in rows])
        value = _fit(x, y)
        rng = np.random.default_rng(0)
        draws = np.array([_fit(x[r], y[r]) for r in (rng.integers(0, len(y), len(y)) for _ in range(RESAMPLES))])
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
        return {
            name: Effect(technique=name, metric=metric, value=float(value[k]), low=float(low[k]), high=float(high[k]),
                         n=int(x[:, k].sum()), method="regression")
            for k, name in enumerate(self.names, start=1)
        }

    def interactions(self, metric: str) -> list[Effect]:
        """Pairs for which all four of neither, A, B and A+B were measured beside the same rest."""
        gaps: dict[tuple[str, str], list[float]] = {}
        for i, parts in enumerate(self.parts):
            for a, b in itertools.combinations(sorted(parts, key=lambda t: (t.stage, t.name)), 2):
                corners = [self.index.get(parts - gone) for gone in ({a}, {b}, {a, b})]
                if any(c is None for c in corners):
                    continue
                places = [self.place(k, metric) for k in (i, *corners) if k is not None]
                if None not in places:
                    both, only_b, only_a, neither = (_sure(p) for p in places)
                    gaps.setdefault((a.name, b.name), []).append(both - only_a - only_b + neither)
        return [
            Effect(
                technique=f"{a} + {b}", metric=metric, value=float(np.mean(values)), n=len(values), method="paired",
                **_interval(values),
            )
            for (a, b), values in gaps.items()
        ]


def backfired(effects: Sequence[Effect]) -> list[Backfire]:
    """Techniques that surely raised a resource they declare to lower."""
    found = []
    for effect in effects:
        technique = catalogue()[effect.technique]
        resource = next((r for r, metric in SIGN_OF.items() if metric == effect.metric), "")
        if resource not in technique.lowers or not effect.worse:
            continue
        warned = f"; it warns that {resource} may rise" if resource in technique.may_raise else ""
        found.append(Backfire(
            effect, resource,
            f"{effect.technique} should lower {resource} ({technique.lowers[resource]}), and here {effect.metric}"
            f" became {effect.ratio:.2f} times what it was ({effect.n} {effect.method}){warned}",
        ))
    return found


def rank_correlation(trials: Sequence[Trial], metric: str) -> Quantity:
    """Spearman's rho between the screen and the full measurement, over trials that have both (the parent left out)."""
    pairs = [
        (s, v) for t in trials if t.recipe != "parent"
        and (s := t.screen.value(metric)) is not None and (v := t.value(metric)) is not None
    ]
    if len(pairs) < 3:
        return Quantity.missing("1", f"{len(pairs)} trials have both, and 3 are needed")
    a, b = (_ranks(column) for column in zip(*pairs, strict=True))
    if a.std() == 0 or b.std() == 0:
        return Quantity.missing("1", "all values are equal, so they have no order")
    rho = float(np.corrcoef(a, b)[0, 1])
    return Quantity(value=rho, unit="1", method="measured", n=len(pairs))


def _ranks(values: Sequence[float]) -> Array:
    """Ranks from 0; equal values share the mean of theirs."""
    x = np.asarray(values, dtype=float)
    return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])


def _failures(trials: Sequence[Trial]) -> dict[str, int]:
    counted: dict[str, int] = {}
    for trial in trials:
        if trial.outcome.failed:
            counted[trial.outcome.value] = counted.get(trial.outcome.value, 0) + 1
    return counted


def _fit(x: Array, y: Array) -> Array:
    """Least squares with a touch of ridge, so that techniques that always occur together share their effect."""
    out: Array = np.asarray(np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y), dtype=np.float64)
    return out


def _bootstrap(n: int, statistic: Callable[[NDArray[np.int64]], float]) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    draws = [statistic(rng.integers(0, n, n)) for _ in range(RESAMPLES)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def _interval(values: Sequence[float]) -> dict[str, float | None]:
    if len(values) < 2:
        return {"low": None, "high": None}
    array: Array = np.array(values, dtype=np.float64)
    low, high = _bootstrap(len(values), lambda rows: float(array[rows].mean()))
    return {"low": low, "high": high}


def _sure(value: float | None) -> float:
    assert value is not None
    return value
