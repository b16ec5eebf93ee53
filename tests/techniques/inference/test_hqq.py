from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fivefold.errors import Misfit
from fivefold.recipe import Recipe
from fivefold.techniques._shared.grids import Grid, round_to
from fivefold.techniques.inference.hqq import Hqq
from fivefold.weights import read_tensors


def heavy_tailed(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) / (torch.rand(rows, columns, generator=generator) + 0.05)


def objective(matrix: torch.Tensor, weight: torch.Tensor, group: int, norm: float) -> torch.Tensor:
    return (matrix - weight).double().abs().pow(norm).view(len(weight), -1, group).sum(2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_group_ends_worse_than_rounding_and_most_end_better(bits):
    weight = heavy_tailed(48, 128)
    start = objective(round_to(weight, Grid(bits=bits, group=32, symmetric=False)).matrix(), weight, 32, 0.7)
    end = objective(Hqq(bits=bits).solve(weight).matrix(), weight, 32, 0.7)
    assert (end <= start * (1 + 1e-5)).all()
    assert (end < 0.99 * start).double().mean() > 0.3
    assert end.sum() < 0.98 * start.sum()


def test_more_rounds_never_raise_the_objective():
    weight = heavy_tailed(32, 128)
    totals = [float(objective(Hqq(bits=3, rounds=r).solve(weight).matrix(), weight, 32, 0.7).sum()) for r in
              (1, 2, 5, 20)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(totals))


def test_the_offset_is_close_to_the_best_of_a_fine_search():
    weight = heavy_tailed(24, 64)
    done = Hqq(bits=3).solve(weight)
    cells, scale = weight.view(24, -1, 32), done.scale[..., None]
    low = cells.amin(2, keepdim=True)
    best = torch.full((24, 2), torch.inf, dtype=torch.float64)
    for shift in torch.linspace(-1.5, 1.5, 301):
        offset = low + shift * scale
        value = ((cells - offset) / scale).round().clamp(0, 7) * scale + offset
        best = torch.minimum(best, (value - cells).double().abs().pow(0.7).sum(2))
    start = objective(round_to(weight, Grid(bits=3, group=32, symmetric=False)).matrix(), weight, 32, 0.7)
    end = objective(done.matrix(), weight, 32, 0.7)
    assert (end >= best * 0.995).all()
    assert (start - end).sum() > 0.4 * (start - best).sum()


def test_the_shrinking_step_lowers_the_half_quadratic_objective():
    x, beta, norm = torch.linspace(-2, 2, 401, dtype=torch.float64), 10.0, 0.7
    e = Hqq(norm=norm)._shrink(x, beta)

    def half(e: torch.Tensor) -> torch.Tensor:
        return e.abs().pow(norm) + beta / 2 * (x - e).square()

    every = torch.linspace(-2, 2, 4001, dtype=torch.float64)[:, None]
    best = (every.abs().pow(norm) + beta / 2 * (x - every).square()).amin(0)
    assert (half(e) <= torch.minimum(half(x), half(torch.zeros_like(x))) + 0.12).all()
    assert half(e).mean() < 1.05 * best.mean()


def test_the_stored_layers_hold_what_was_solved(tiny):
    from fivefold.engines._layers import grouped

    model = tiny("llama", layers=1)
    done = Recipe.parse("hqq(bits=3)").apply(model)
    name = "model.layers.0.mlp.down_proj"
    after = dict(read_tensors(done.path))
    weight = dict(read_tensors(model.path))[f"{name}.weight"].torch()
    got = grouped.unpack({k: after[f"{name}.{k}"].torch() for k in ("codes", "scale", "offset")}, *weight.shape)
    assert torch.equal(got, Hqq(bits=3).solve(weight).matrix())
    assert done.coverage[-1].startswith("hqq: 7 of 7 linear layers in 3 bits in groups of 32, with offsets")


def test_it_never_looks_at_text(tiny):
    model = tiny("llama", layers=1)
    done = Recipe.parse("hqq").apply(model.but(calibration=model.path / "there is none"))
    assert done.coverage


def test_what_no_type_holds_is_refused(tiny):
    model = tiny("llama", layers=1)
    with pytest.raises(Misfit, match="8-bit type has no offsets"):
        Recipe.parse('hqq(bits=8, into="gguf")').check(model)
    assert np.isclose(Hqq().norm, 0.7)
