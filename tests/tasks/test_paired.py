"""Paired statistics against enumeration, the binomial test of scipy, and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from fivefold.errors import DataError
from fivefold.tasks.paired import Decision, interval, mcnemar, paired_bootstrap, verdict


@pytest.mark.parametrize(("better", "worse", "same"), [(0, 0, 5), (1, 0, 3), (7, 2, 11), (30, 45, 100)])
def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_items(better: int, worse: int, same: int) -> None:
    a = [0] * better + [1] * worse + [1] * same
    b = [1] * better + [0] * worse + [1] * same
    want = binomtest(better, better + worse, 0.5).pvalue if better + worse else 1.0
    assert mcnemar(a, b) == pytest.approx(want)


def test_bootstrap_equals_all_resamples_of_a_tiny_set() -> None:
    a, b = np.array([0.0, 1.0, 0.5, 0.25]), np.array([0.5, 1.5, 0.0, 1.0])
    means = [np.mean(draw) for draw in itertools.product(b - a, repeat=4)]
    want = np.quantile(means, (0.025, 0.975))
    assert np.allclose(paired_bootstrap(a, b, rounds=200_000), want, atol=0.03)


def test_bootstrap_of_clusters_is_wider_when_items_repeat() -> None:
    random = np.random.default_rng(0)
    each = random.normal(size=20)
    a, b, clusters = np.zeros(200), np.repeat(each, 10), np.repeat(np.arange(20), 10)
    naive, honest = paired_bootstrap(a, b), paired_bootstrap(a, b, clusters=clusters)
    single = paired_bootstrap(np.zeros(20), each)
    assert honest == pytest.approx(single)
    assert honest[1] - honest[0] > 2.5 * (naive[1] - naive[0])


def test_interval_of_right_or_wrong_items_by_hand() -> None:
    d = [1] * 4 + [-1] * 9 + [0] * 37
    up, down, n = 4.5, 9.5, 52
    half = 1.959964 * math.sqrt((up + down) - (up - down) ** 2 / n) / n
    assert interval(d) == pytest.approx(((up - down) / n - half, (up - down) / n + half), rel=1e-5)


@pytest.mark.parametrize("p", [(0.02, 0.02), (0.05, 0.15), (0.3, 0.2)])
def test_interval_of_right_or_wrong_items_covers_the_truth(p: tuple[float, float]) -> None:
    """Exact coverage over every outcome of 40 items."""
    n, (up, down) = 40, p
    covered = 0.0
    for better in range(n + 1):
        for worse in range(n + 1 - better):
            same = n - better - worse
            ways = math.factorial(n) // (math.factorial(better) * math.factorial(worse) * math.factorial(same))
            low, high = interval([1] * better + [-1] * worse + [0] * same)
            if low <= up - down <= high:
                covered += ways * up**better * down**worse * (1 - up - down) ** same
    assert covered > 0.93
    assert covered < 0.98 or up + down < 0.1


def test_interval_of_clustered_values_covers_the_truth() -> None:
    random = np.random.default_rng(1)
    clusters = np.repeat(np.arange(8), 25)
    hits = 0
    for _ in range(800):
        d = random.normal(size=8).repeat(25) + random.normal(size=200)
        low, high = interval(d, clusters)
        hits += low <= 0 <= high
    assert 0.93 < hits / 800 < 0.97


def test_verdicts_on_clear_cases() -> None:
    ones = np.ones(400)
    worse = ones.copy()
    worse[:120] = 0
    assert verdict(ones, ones, 0.02).decision is Decision.ACCEPT
    assert verdict(ones, worse, 0.02).decision is Decision.REGRESSION
    assert verdict(worse, ones, 0.0).decision is Decision.ACCEPT
    assert verdict(np.ones(5), np.ones(5), 0.02).decision is Decision.INCONCLUSIVE
    loss = np.random.default_rng(0).normal(3, 1, 300)
    assert verdict(loss, loss + 0.5, 0.1, better="lower").decision is Decision.REGRESSION
    assert verdict(loss, loss + 0.5, 0.1).decision is Decision.ACCEPT


def test_items_needed_would_decide() -> None:
    random = np.random.default_rng(3)
    a = random.normal(size=60)
    noise = random.normal(size=60)
    b = a + 0.9 * (noise - noise.mean()) - 0.05
    found = verdict(a, b, 0.15)
    assert found.decision is Decision.INCONCLUSIVE
    assert found.items_needed is not None and found.items_needed > 60
    times = math.ceil(found.items_needed / 60)
    assert verdict(np.tile(a, times), np.tile(b, times), 0.15).decision is Decision.ACCEPT
    fewer = found.items_needed // 60 // 2
    assert fewer >= 1
    assert verdict(np.tile(a, fewer), np.tile(b, fewer), 0.15).decision is Decision.INCONCLUSIVE


@pytest.mark.parametrize(("a", "b"), [([1, 0], [1]), ([1], [1]), ([1, math.nan], [1, 0])])
def test_what_cannot_be_paired_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(DataError):
        verdict(a, b, 0.01)
    with pytest.raises(DataError, match="one cluster"):
        verdict([0.1, 0.2], [0.3, 0.1], 0.01, clusters=[0, 0])
    with pytest.raises(DataError, match="margin"):
        verdict([1, 0], [1, 0], -0.1)
