from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax as scipy_log_softmax
from scipy.stats import chisquare

from fivefold.engines import Sampling
from fivefold.engines._sampling import _from_nucleus, _inverse, drawer, log_softmax
from fivefold.errors import DataError, NotFinite


def nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Add tokens from the most probable down until their mass reaches top_p; renormalise."""
    kept = np.zeros_like(probabilities)
    for i in np.argsort(-probabilities, kind="stable"):
        kept[i] = probabilities[i]
        if kept.sum() >= top_p * probabilities.sum():
            break
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.3, 0.7), (1.0, 0.05)])
def test_draws_follow_the_distribution(temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(1).normal(size=12).astype(np.float32)
    probabilities = np.exp(scipy_log_softmax(logits.astype(np.float64) / temperature))
    expected = nucleus(probabilities, top_p)
    draw = drawer(Sampling(temperature=temperature, top_p=top_p, seed=3))
    observed = np.bincount([draw(logits) for _ in range(20000)], minlength=12)
    inside = expected > 0
    assert not observed[~inside].any()
    if inside.sum() > 1:
        assert chisquare(observed[inside], 20000 * expected[inside]).pvalue > 1e-4


@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=30), st.floats(0.01, 0.99), st.floats(0, 0.999))
def test_the_nucleus_is_inverted_exactly(weights: list[float], top_p: float, uniform: float) -> None:
    values = np.array(weights, np.float32)
    expected = nucleus(values.astype(np.float64), top_p)
    assert expected[_from_nucleus(values, top_p, uniform)] > 0


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_every_index_has_its_share_of_the_unit_interval(size: int) -> None:
    weights = np.random.default_rng(size).random(size).astype(np.float32)
    weights[1::3] = 0
    edges = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    for i in np.flatnonzero(weights > 1e-3):
        low = edges[i - 1] if i else 0.0
        for inside in (0.05, 0.5, 0.95):
            assert _inverse(weights, low + inside * (edges[i] - low)) == i
    assert weights[_inverse(weights, 0.0)] > 0 and weights[_inverse(weights, np.nextafter(1, 0))] > 0


def test_greedy_and_seeds() -> None:
    logits = np.array([0.0, 3.0, 1.0], np.float32)
    assert drawer(Sampling())(logits) == 1
    first, second = (drawer(Sampling(temperature=2.0, seed=5)) for _ in range(2))
    assert [first(logits) for _ in range(50)] == [second(logits) for _ in range(50)]


@pytest.mark.parametrize("sampling", [Sampling(temperature=-1.0), Sampling(top_p=0.0), Sampling(top_p=1.1),
                                      Sampling(temperature=float("nan"))])
def test_bad_settings_are_refused(sampling: Sampling) -> None:
    with pytest.raises(DataError, match="give temperature >= 0"):
        drawer(sampling)


@pytest.mark.parametrize("top_p", [0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_a_failure(top_p: float, temperature: float) -> None:
    with pytest.raises(NotFinite):
        drawer(Sampling(temperature=temperature, top_p=top_p))(np.array([1.0, np.nan], np.float32))


def test_log_softmax_equals_scipy() -> None:
    logits = (50 * np.random.default_rng(0).normal(size=(37, 500))).astype(np.float32)
    out = np.empty_like(logits)
    log_softmax(logits, out)
    np.testing.assert_allclose(out, scipy_log_softmax(logits.astype(np.float64), axis=1), rtol=1e-5, atol=1e-5)
