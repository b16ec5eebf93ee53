"""Comparing two models item by item: the same items, so what is hard for both cancels.

The variance of a paired difference is var(a) + var(b) - 2 cov(a, b); a model and its compressed copy mostly err on
the same items, so far fewer items decide. `verdict` is a test of non-inferiority with a margin: the difference
B - A has a 95 % interval, and

    ACCEPT         the whole interval is at or above -margin: at worst a loss one is ready to bear
    REGRESSION     the whole interval is below -margin
    INCONCLUSIVE   the interval contains -margin; with the same difference and variance, n grown by the factor
                   (half width / distance of the difference from -margin)^2 would decide

Intervals: right-or-wrong items get Agresti and Min's (half an item added to each of the four cells, so that it does
not collapse when the models never differ), other values Student's t, clustered values the clustered t; of clustered
right-or-wrong items the wider of the two.

Sources: McNemar, Psychometrika 12 (1947); Agresti and Min, Statistics in Medicine 24 (2005); Efron and Tibshirani,
An Introduction to the Bootstrap (1993).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fivefold.errors import DataError
from fivefold.tasks._intervals import Z95, clustered_error, student95


class Decision(enum.StrEnum):
    ACCEPT = "accept"
    REGRESSION = "regression"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Verdict:
    """`difference` is B - A in the direction of better; `items_needed` is the total n that would decide, or None."""

    decision: Decision
    difference: float
    interval: tuple[float, float]
    n: int
    items_needed: int | None = None

    def __str__(self) -> str:
        low, high = self.interval
        more = f"; about {self.items_needed} items would decide" if self.items_needed else ""
        return f"{self.decision}: {self.difference:+.4g} [{low:+.4g}, {high:+.4g}] on {self.n} items{more}"


def verdict(
    per_item_a: ArrayLike, per_item_b: ArrayLike, margin: float, *,
    better: Literal["higher", "lower"] = "higher", clusters: ArrayLike | None = None,
) -> Verdict:
    """Is B no worse than A by more than `margin` (in the items' unit)? Raises DataError on unpaired or few items."""
    d = _differences(per_item_a, per_item_b) * (1 if better == "higher" else -1)
    if not margin >= 0:
        raise DataError(f"the margin is {margin}; give a number of at least 0")
    low, high = interval(d, clusters)
    difference = float(d.mean())
    if low >= -margin:
        return Verdict(Decision.ACCEPT, difference, (low, high), len(d))
    if high < -margin:
        return Verdict(Decision.REGRESSION, difference, (low, high), len(d))
    distance = abs(difference + margin)
    ratio = (high - low) / 2 / distance if distance > 0 else math.inf
    needed = math.ceil(len(d) * ratio**2) if ratio < 1e6 else None
    return Verdict(Decision.INCONCLUSIVE, difference, (low, high), len(d), needed and max(needed, len(d) + 1))


def interval(differences: ArrayLike, clusters: ArrayLike | None = None) -> tuple[float, float]:
    """95 % interval of the mean of paired differences (n,), n >= 2; see the module for which."""
    d = np.asarray(differences, np.float64)
    centre = float(d.mean())
    each = np.arange(len(d)) if clusters is None else np.asarray(clusters)
    found: list[tuple[float, float]] = []
    if np.isin(d, (-1.0, 0.0, 1.0)).all():
        found.append(_agresti_min(int((d > 0).sum()), int((d < 0).sum()), len(d)))
    if clusters is not None or not found:
        error, count = clustered_error(d, each)
        if count < 2:
            raise DataError("all items lie in one cluster, so no interval can be given; use more windows")
        half = student95(count - 1) * error
        found.append((centre - half, centre + half))
    return max(found, key=lambda pair: pair[1] - pair[0])


def _agresti_min(better: int, worse: int, n: int) -> tuple[float, float]:
    up, down, total = better + 0.5, worse + 0.5, n + 2
    centre = (up - down) / total
    half = Z95 * math.sqrt((up + down) - (up - down) ** 2 / total) / total
    return max(-1.0, centre - half), min(1.0, centre + half)


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> float:
    """Exact two-sided p-value that A and B are right equally often: items only one gets right are fair coins."""
    d = _differences(correct_a, correct_b)
    better, worse = int((d > 0).sum()), int((d < 0).sum())
    n, few = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n)


def paired_bootstrap(
    per_item_a: ArrayLike, per_item_b: ArrayLike, *, rounds: int = 10_000, seed: int = 0,
    clusters: ArrayLike | None = None,
) -> tuple[float, float]:
    """Percentile 95 % interval of the mean of B - A; whole clusters are drawn where they are given."""
    d = _differences(per_item_a, per_item_b)
    groups = np.unique(np.arange(len(d)) if clusters is None else np.asarray(clusters), return_inverse=True)[1]
    sums, sizes = np.bincount(groups, d), np.bincount(groups).astype(np.float64)
    random = np.random.default_rng(seed)
    block = max(1, (1 << 22) // len(sums))
    means: list[NDArray[np.float64]] = []
    for first in range(0, rounds, block):
        drawn = random.integers(len(sums), size=(min(block, rounds - first), len(sums)))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def _differences(per_item_a: ArrayLike, per_item_b: ArrayLike) -> NDArray[np.float64]:
    a, b = np.asarray(per_item_a, np.float64), np.asarray(per_item_b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise DataError(f"{len(a)} and {len(b)} items cannot be paired; score both models on the same 2 or more items")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DataError("an item's score is not finite, so the models cannot be compared; score them again")
    return b - a
