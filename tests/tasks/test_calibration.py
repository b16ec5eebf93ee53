"""Calibration against loops over sorted answers, closed forms of a known gap, and simulated coverage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fivefold.errors import DataError, NotFinite
from fivefold.tasks.calibration import bins_of, calibration, ece, floor, of_choices
from fivefold.tasks.choice import Answers
from fivefold.tasks.fidelity import Reference, fidelity

answers = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


def by_hand(confidence: list[float], right: list[bool], bins: int) -> float:
    """Sort, cut into equal counts, sum the gaps; for n a multiple of `bins` and no two confidences equal."""
    order = sorted(range(len(confidence)), key=confidence.__getitem__)
    size, total = len(order) // bins, 0.0
    for b in range(bins):
        inside = order[b * size : (b + 1) * size]
        gap = sum(confidence[i] for i in inside) / size - sum(right[i] for i in inside) / size
        total += size / len(order) * abs(gap)
    return total


@pytest.mark.parametrize("bins", [1, 3, 15])
def test_ece_equals_a_loop_over_equal_counts(bins: int) -> None:
    random = np.random.default_rng(bins)
    confidence, right = random.random(300).tolist(), (random.random(300) < 0.4).tolist()
    assert ece(confidence, right, bins) == pytest.approx(by_hand(confidence, right, bins))


def test_a_constant_gap_is_the_ece() -> None:
    """In every bin 7 of 10 answers are right at a confidence of 0.9 + tiny differences between bins."""
    confidence = np.repeat(0.9 + np.arange(15) * 1e-6, 10)
    right = np.tile([1] * 7 + [0] * 3, 15)
    assert ece(confidence, right) == pytest.approx(0.2, abs=1e-5)
    assert ece(confidence, np.ones(150)) == pytest.approx(0.1, abs=1e-5)


def test_always_sure_and_right_half_of_the_time() -> None:
    assert ece(np.ones(40), [True, False] * 20) == 0.5
    assert ece(np.ones(40), np.ones(40)) == 0


@given(answers)
def test_ece_knows_no_order_and_is_a_share(pairs: list[tuple[float, bool]]) -> None:
    x, hit = (np.array(column, float) for column in zip(*pairs, strict=True))
    found = ece(x, hit, 5)
    assert 0 <= found <= 1
    assert ece(x[::-1], hit[::-1], 5) == pytest.approx(found, abs=1e-12)
    assert found >= abs(x.mean() - hit.mean()) - 1e-12, "one bin is the least that can be seen"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_bins_follow_confidence_and_equal_ones_share(values: list[float]) -> None:
    x = np.array(values)
    bins = bins_of(x, 4)
    for i in range(len(x)):
        assert ((bins[x == x[i]] == bins[i]).all()) and (bins[x > x[i]] >= bins[i]).all()


@pytest.mark.parametrize(("n", "bins"), [(10, 1), (100, 5), (299, 14), (300, 15), (5000, 15)])
def test_few_answers_make_few_bins(n: int, bins: int) -> None:
    assert len(set(bins_of(np.random.default_rng(0).random(n)).tolist())) == bins


def test_the_floor_is_what_a_calibrated_model_shows() -> None:
    random = np.random.default_rng(1)
    x = random.uniform(0.3, 1, 600)
    shown = [ece(x, random.random(600) < x) for _ in range(400)]
    assert np.mean(shown) == pytest.approx(floor(x), rel=0.05)
    assert np.mean(shown) > 0.03, "600 calibrated answers look 3 points wrong"


@pytest.mark.parametrize("gap", [0.0, 0.1, 0.25])
def test_the_interval_covers_a_known_gap(gap: float) -> None:
    """Confidence 0.5 to 1, right with probability confidence - gap: the true error is the gap."""
    random = np.random.default_rng(2)
    covered, told = 0, 0
    for _ in range(150):
        x = random.uniform(0.5, 1, 400)
        found = calibration(x, random.random(400) < x - gap, np.arange(400))
        covered += found.low <= gap + 1e-9 and gap <= found.high
        told += found.low > 0
    assert covered >= 0.93 * 150
    assert gap < 0.2 or told == 150, "an interval that always reached 0 would cover too"


def test_the_interval_is_wider_when_windows_repeat() -> None:
    random = np.random.default_rng(3)
    x, hit = random.uniform(0.4, 1, 30), random.random(30) < 0.3
    repeated = calibration(np.repeat(x, 20), np.repeat(hit, 20), np.repeat(np.arange(30), 20))
    naive = calibration(np.repeat(x, 20), np.repeat(hit, 20), np.arange(600))
    assert repeated.high - repeated.low > 2 * (naive.high - naive.low)
    alone = calibration(x, hit, np.zeros(30))
    assert alone.low is None and "one window" in alone.reason


def test_what_is_no_calibration_is_refused() -> None:
    with pytest.raises(DataError, match="one of each"):
        ece([0.5], [1, 0])
    with pytest.raises(DataError, match="one of each"):
        ece([], [])
    with pytest.raises(DataError, match="not a probability"):
        ece([1.5], [1])
    with pytest.raises(NotFinite):
        ece([np.nan], [1])


def test_choices_by_a_loop() -> None:
    random = np.random.default_rng(4)
    rows = [random.dirichlet([1.0] * random.integers(2, 5)) for _ in range(60)]
    right = random.integers(0, 2, 60)
    found = of_choices(Answers("t", "d", tuple(rows), right))
    hits = [bool(r.argmax() == a) for r, a in zip(rows, right, strict=True)]
    assert found.value("choice_ece") == pytest.approx(by_hand([float(r.max()) for r in rows], hits, 3))
    assert found["choice_ece"].n == 60 and found.context["choice_ece_floor"] > 0


class Coin:
    """Gives token 0 the same probability everywhere."""

    vocab = 4

    def __init__(self, sure: float) -> None:
        self.row = np.log([sure, *[(1 - sure) / 3] * 3]).astype(np.float32)

    def score(self, tokens: list[int]) -> np.ndarray:
        return np.tile(self.row, (len(tokens), 1))


def test_fidelity_carries_the_calibration_of_both_models() -> None:
    """Token 0 follows in 3 of 5 places: at 0.9 the error is 0.3, at 0.6 none; the reference knows its own."""
    windows = [[1, *[0, 0, 0, 1, 2] * 6] for _ in range(4)]
    reference = Reference.record(Coin(0.9), windows, k=1)
    assert reference.itself().measurement.value("ece") == pytest.approx(0.3, abs=1e-6)
    found = fidelity(Coin(0.6), reference)
    assert found.measurement.value("ece") == pytest.approx(0.0, abs=1e-6)
    assert found.right.tolist() == [t == 0 for w in windows for t in w[1:]]
    assert np.allclose(found.confidence, 0.6)
    again = fidelity(Coin(0.9), reference)
    assert np.allclose(again.confidence, reference.itself().confidence)
    assert (again.right == reference.itself().right).all()
