import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fivefold.quantity import Measurement, Quantity


@pytest.mark.parametrize("n", [6, 9, 20, 51])
def test_median_interval_covers_95_percent_by_the_binomial_law(n: int) -> None:
    quantity = Quantity.median_of([float(i) for i in range(n)], "s")
    rank = int(quantity.low)

    def coverage(r: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(r + 1)) / 2**n

    assert coverage(rank) >= 0.95
    assert coverage(rank + 1) < 0.95
    assert quantity.high == n - 1 - rank


def test_median_interval_of_few_samples_is_the_range() -> None:
    quantity = Quantity.median_of([3.0, 1.0, 2.0], "s")
    assert (quantity.value, quantity.low, quantity.high, quantity.n) == (2.0, 1.0, 3.0, 3)


def test_exhaustive_coverage_for_seven_samples() -> None:
    # Each sample falls above or below the true median with equal odds: enumerate all 2**7 patterns.
    low = Quantity.median_of([float(i) for i in range(7)], "s").low
    inside = sum(low < sum(signs) < 7 - low for signs in itertools.product((0, 1), repeat=7))
    assert inside / 2**7 >= 0.95


def test_negative_factor_swaps_the_interval() -> None:
    scaled = Quantity(value=2.0, unit="a", method="measured", low=1.0, high=4.0).scaled(-1.0, "b")
    assert (scaled.value, scaled.low, scaled.high, scaled.unit) == (-2.0, -4.0, -1.0, "b")


def test_no_samples_is_an_error_and_missing_is_not_zero() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Quantity.median_of([], "s")
    assert Quantity.missing("J", "no counter").value is None


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=30))
def test_json_round_trip_and_order(samples: list[float]) -> None:
    quantity = Quantity.median_of(samples, "s")
    assert quantity.low <= quantity.value <= quantity.high
    measurement = Measurement({"latency": quantity, "kl": Quantity.missing("nat", "none")}, {"engine": "torch"})
    assert Measurement.from_json(measurement.to_json()) == measurement
