"""Intervals for means of items that may come in clusters (the windows of a text, the items of a document).

Neighbouring tokens are alike, so n tokens from G windows say less than n independent ones. With the window as the
unit, the variance of a mean is G/(G-1) * sum_g (sum of deviations in g)^2 / n^2 and the interval uses Student's t
with G - 1 degrees of freedom. Proportions use Wilson's interval, which does not collapse at 0 or 1, with the
effective number of items n / design effect, the ratio of the two variances (at least 1).

Sources: Wilson, JASA 22 (1927); Cameron and Miller, Journal of Human Resources 50 (2015).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from fivefold.quantity import Quantity

Z95 = 1.959963984540054


def student95(degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))


def clustered_error(values: ArrayLike, clusters: ArrayLike) -> tuple[float, int]:
    """Standard error of the mean of `values` (n,), and the number of clusters. NaN with fewer than two clusters."""
    x = np.asarray(values, np.float64)
    groups = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sums = np.bincount(groups, x - x.mean())
    count = len(sums)
    if count < 2:
        return math.nan, count
    return math.sqrt(count / (count - 1) * float((sums**2).sum())) / len(x), count


def mean(values: ArrayLike, clusters: ArrayLike, unit: str) -> Quantity:
    """The mean with its clustered 95 % interval; no interval, and the reason, when there is one cluster only."""
    x = np.asarray(values, np.float64)
    value = float(x.mean())
    error, count = clustered_error(x, clusters)
    if count < 2:
        return Quantity(value=value, unit=unit, method="measured", n=len(x), reason="no interval: one window only")
    half = student95(count - 1) * error
    return Quantity(value=value, unit=unit, method="measured", n=len(x), low=value - half, high=value + half)


def wilson(share: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a proportion observed as `share` of `n`."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def proportion(hits: ArrayLike, clusters: ArrayLike | None = None) -> Quantity:
    """The share of true values with Wilson's 95 % interval, widened by the design effect of the clusters."""
    x = np.asarray(hits, np.float64)
    value, n, z = float(x.mean()), len(x), Z95
    effective = float(n)
    if clusters is not None:
        error, count = clustered_error(x, clusters)
        if count < 2:
            return Quantity(
                value=value, unit="fraction", method="measured", n=n, reason="no interval: one window only"
            )
        plain = value * (1 - value) / n
        effective = n / max(1.0, error**2 / plain) if plain > 0 else float(n)
        z = student95(count - 1)
    low, high = wilson(value, effective, z)
    return Quantity(value=value, unit="fraction", method="measured", n=n, low=low, high=high)


def quantile(values: ArrayLike, share: float, unit: str) -> Quantity:
    """A quantile with the order-statistic 95 % interval (values taken as independent; None where n is too small)."""
    from scipy.stats import binom

    x = np.sort(np.asarray(values, np.float64))
    n = len(x)
    low, high = int(binom.ppf(0.025, n, share)) - 1, int(binom.ppf(0.975, n, share))
    return Quantity(
        value=float(np.quantile(x, share)), unit=unit, method="measured", n=n,
        low=float(x[low]) if low >= 0 else None, high=float(x[high]) if high < n else None,
    )
