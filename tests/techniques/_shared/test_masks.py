"""The largest of all numbers of a model, against sorting them all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fivefold.techniques._shared.masks import apply, chosen, empty, fill_largest


def brute_force(values: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """By a stable sort: equal numbers in the order of names and positions."""
    flat = torch.cat([v.float().abs().flatten() for v in values.values()])
    order = torch.sort(flat, descending=True, stable=True).indices[:count]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order] = True
    parts = mask.split([v.numel() for v in values.values()])
    return {name: part.view(v.shape) for (name, v), part in zip(values.items(), parts, strict=True)}


def assert_is_brute_force(values: dict[str, torch.Tensor], count: int) -> None:
    masks = empty(values)
    fill_largest(masks, values.__getitem__, count)
    for name, mask in brute_force(values, count).items():
        assert torch.equal(masks[name], mask), name
    assert chosen(masks) == count


@pytest.mark.parametrize("count", [1, 2, 99, 1000, 4999, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_magnitudes(count: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    values = {str(i): torch.randn(shape, generator=draw).mul(10.0 ** (-9 * i)).to(dtype)
              for i, shape in enumerate([(30, 50), (500,), (60, 50)])}
    assert_is_brute_force(values, count)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, -0.0, 1e-45, 1.0, -1.0, 1.0000001, 3e38]), min_size=1, max_size=9),
                min_size=1, max_size=4), st.data())
def test_ties_go_to_the_first(rows: list[list[float]], data: st.DataObject) -> None:
    values = {str(i): torch.tensor(row) for i, row in enumerate(rows)}
    assert_is_brute_force(values, data.draw(st.integers(1, sum(map(len, rows)))))


@pytest.mark.parametrize("count", [0, 11])
def test_more_than_there_are_or_none_is_an_error(count: int) -> None:
    with pytest.raises(ValueError, match="of 10 numbers"):
        fill_largest(empty({"a": torch.ones(10)}), lambda name: torch.ones(10), count)


def test_gradients_outside_become_zero() -> None:
    inside, without = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    inside.grad = torch.tensor([1.0, -2.0, 3.0])
    apply({"a": inside, "b": without}, {"a": torch.tensor([True, False, True]), "b": torch.zeros(2, dtype=torch.bool)})
    assert inside.grad.tolist() == [1.0, 0.0, 3.0] and without.grad is None
