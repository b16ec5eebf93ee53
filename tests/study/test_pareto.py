"""The front by brute force, the hypervolume against Monte Carlo and optuna, constraint domination by hand."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import trial

from fivefold.budget import Budget
from fivefold.study.pareto import (
    Goal,
    contributions,
    coordinate,
    dominates,
    front,
    hypervolume,
    knee,
    nondominated,
    ranks,
    scaled,
)
from fivefold.study.trial import Outcome

places = st.integers(2, 4).flatmap(
    lambda d: st.lists(st.tuples(*[st.integers(0, 6).map(float)] * d), min_size=1, max_size=9)
)


@settings(max_examples=80, deadline=None)
@given(places)
def test_hypervolume_equals_counted_cells(points: list[tuple[float, ...]]) -> None:
    """On integer points the volume is the number of unit cells that some point dominates."""
    d, top = len(points[0]), 7
    cells = np.stack(np.meshgrid(*[np.arange(top)] * d, indexing="ij"), -1).reshape(-1, d)
    covered = np.zeros(len(cells), bool)
    for p in points:
        covered |= (cells >= np.array(p)).all(1)
    assert hypervolume(points, (float(top),) * d) == pytest.approx(covered.sum())


@pytest.mark.parametrize("d", [2, 3, 4, 5])
def test_hypervolume_equals_optuna(d: int) -> None:
    from optuna._hypervolume import compute_hypervolume

    rng = np.random.default_rng(d)
    points = rng.random((20, d)) * 1.2
    reference = np.ones(d)
    inside = points[(points < 1).all(1)]
    assert hypervolume([tuple(p) for p in points], (1.0,) * d) == pytest.approx(compute_hypervolume(inside, reference))


def test_points_beyond_the_reference_count_nothing() -> None:
    assert hypervolume([(2.0, 0.0)], (1.0, 1.0)) == 0.0
    assert hypervolume([], (1.0, 1.0)) == 0.0


@settings(max_examples=60, deadline=None)
@given(places)
def test_nondominated_is_what_nothing_dominates(points: list[tuple[float, ...]]) -> None:
    kept = {points[i] for i in nondominated(points)}
    assert kept == {p for p in points if not any(dominates(q, p) for q in points)}
    assert len(kept) == len(nondominated(points))


def test_contributions_are_what_is_lost() -> None:
    points = [(0.0, 2.0), (1.0, 1.0), (2.0, 0.0)]
    assert contributions(points, (3.0, 3.0)) == [1.0, 1.0, 1.0]


def test_ranks_put_limits_first() -> None:
    points = [(0.0, 0.0), (5.0, 5.0), (6.0, 4.0), (7.0, 7.0), (1.0, 1.0)]
    excess = [0.5, 0.0, -1.0, 0.0, 0.2]
    assert ranks(points, excess) == [3, 0, 0, 1, 2]


def test_front_keeps_the_budget_and_only_what_was_measured() -> None:
    trials = [
        trial(0, "parent", latency=1.0, size=100.0, agreement=1.0),
        trial(1, "a", latency=0.5, size=50.0, agreement=0.9),
        trial(2, "b", latency=0.6, size=60.0, agreement=0.95),
        trial(3, "c", latency=0.1, size=10.0, agreement=0.2),
        trial(4, "d", Outcome.SCREENED, latency=0.01, size=1.0, agreement=1.0),
    ]
    parent = {"latency": 1.0, "size": 100.0}
    goal = Goal(("latency", "size"), Budget.parse("agreement>=0.8, size<=0.9x"))
    assert [t.number for t in front(trials, goal, parent)] == [1]
    assert [t.number for t in front(trials, Goal(("latency", "agreement")), parent)] == [3, 1, 2, 0]


def test_coordinates_turn_the_sign_and_take_logs() -> None:
    assert coordinate("latency", 4.0) == 2.0
    assert coordinate("decode", 4.0) == -2.0
    assert coordinate("agreement", 0.75) == -0.75
    assert coordinate("kl", 0.0) == 0.0


def test_the_knee_is_in_the_bend() -> None:
    values = [(1.0, 100.0), (2.0, 20.0), (3.0, 10.0), (100.0, 9.0)]
    trials = [trial(i, "x", latency=a, size=b) for i, (a, b) in enumerate(values)]
    chosen = knee(trials, Goal(("latency", "size")))
    assert chosen is not None and chosen.number in (1, 2)
    assert knee([], Goal(("latency",))) is None


def test_scaled_spans_are_equal() -> None:
    moved, reference = scaled([(0.0, 1000.0), (5.0, 3000.0)])
    assert moved == [(0.0, 0.0), (1.0, 1.0)] and reference == (1.1, 1.1)


def test_order_of_trials_does_not_matter() -> None:
    rng = random.Random(1)
    trials = [trial(i, "x", latency=rng.random() + 0.1, size=rng.random() + 0.1) for i in range(12)]
    goal = Goal(("latency", "size"))
    shuffled = rng.sample(trials, len(trials))
    assert front(trials, goal, {}) == front(shuffled, goal, {})
