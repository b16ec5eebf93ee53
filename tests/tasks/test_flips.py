"""Flips against the four cells of McNemar's table, counted by loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fivefold.errors import DataError
from fivefold.tasks.choice import Answers
from fivefold.tasks.flips import flips
from fivefold.tasks.loyalty import loyalty

picks = st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=40)


def of(chosen: list[int], right: list[int], digest: str = "d") -> Answers:
    return Answers("t", digest, tuple(np.eye(3)[c] for c in chosen), np.array(right))


@given(picks)
def test_the_cells_of_the_table(rows: list[tuple[int, int, int]]) -> None:
    before, after, right = (list(column) for column in zip(*rows, strict=True))
    parent, candidate, n = of(before, right), of(after, right), len(rows)
    b = sum(x == r != y for x, y, r in rows)
    c = sum(x != r == y for x, y, r in rows)
    both_wrong = sum(x != r and y != r and x != y for x, y, r in rows)
    found = flips(parent, candidate)
    assert found.measurement.value("flips") == pytest.approx((b + c) / n)
    assert found.measurement.context == {"right_to_wrong": b, "wrong_to_right": c, "wrong_to_wrong": both_wrong}
    assert candidate.correct.mean() - parent.correct.mean() == pytest.approx((c - b) / n)
    kept = loyalty(parent, candidate).value("label_loyalty")
    assert (b + c + both_wrong) / n == pytest.approx(1 - kept)
    back = flips(candidate, parent)
    assert (back.right_to_wrong == found.wrong_to_right).all()


def test_accuracy_may_hide_them() -> None:
    parent, candidate = of([0] * 5 + [1] * 5, [0] * 10), of([1] * 5 + [0] * 5, [0] * 10)
    assert parent.correct.mean() == candidate.correct.mean()
    found = flips(parent, candidate)
    assert found.measurement.value("flips") == 1
    assert found.shares["right_to_wrong"].value == 0.5
    assert found.shares["right_to_wrong"].low < 0.5 < found.shares["right_to_wrong"].high
    assert str(found).startswith("right to wrong 50.0 % [23.7, 76.3], wrong to right 50.0 %")


def test_other_items_are_refused() -> None:
    with pytest.raises(DataError, match="different items"):
        flips(of([0], [0]), of([0], [0], "other"))
