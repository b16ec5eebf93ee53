"""Intervals against closed forms and simulation."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from fivefold.tasks import _intervals


@pytest.mark.parametrize(("hits", "n"), [(0, 12), (5, 20), (20, 20), (140, 200)])
def test_wilson_equals_scipy(hits: int, n: int) -> None:
    want = binomtest(hits, n).proportion_ci(method="wilson")
    assert _intervals.wilson(hits / n, n) == pytest.approx((want.low, want.high), abs=1e-9)


def test_clustered_error_of_independent_items_is_the_plain_one() -> None:
    x = np.random.default_rng(0).normal(size=50)
    error, count = _intervals.clustered_error(x, np.arange(50))
    assert (error, count) == (pytest.approx(x.std(ddof=1) / math.sqrt(50)), 50)


def test_clustered_error_of_repeated_items_counts_each_once() -> None:
    x = np.random.default_rng(0).normal(size=10)
    error, _ = _intervals.clustered_error(np.repeat(x, 7), np.repeat(np.arange(10), 7))
    assert error == pytest.approx(x.std(ddof=1) / math.sqrt(10))


def test_one_cluster_has_no_interval_and_says_why() -> None:
    for quantity in (_intervals.mean([1.0, 2.0], [0, 0], "nat"), _intervals.proportion([1, 0], [0, 0])):
        assert quantity.low is None
        assert "one window" in quantity.reason


def test_proportion_widens_with_clusters_and_survives_certainty() -> None:
    hits = np.repeat(np.random.default_rng(2).random(20) < 0.7, 30)
    plain, honest = _intervals.proportion(hits), _intervals.proportion(hits, np.repeat(np.arange(20), 30))
    assert honest.high - honest.low > 3 * (plain.high - plain.low)
    sure = _intervals.proportion(np.ones(50), np.repeat(np.arange(5), 10))
    assert sure.value == sure.high == 1.0
    assert 0.8 < sure.low < 1.0


def test_quantile_interval_covers_the_truth() -> None:
    random = np.random.default_rng(4)
    hits = 0
    for _ in range(1000):
        found = _intervals.quantile(random.exponential(size=300), 0.9, "nat")
        hits += found.low <= -math.log(0.1) <= found.high
    assert hits / 1000 > 0.93
    assert _intervals.quantile([1.0, 2.0], 0.99, "nat").high is None
