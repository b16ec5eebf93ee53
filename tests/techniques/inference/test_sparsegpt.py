"""The solver against brute force and closed forms on rows of eight; the technique against its layers' real inputs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fivefold.errors import Misfit, RecipeError
from fivefold.recipe import Recipe
from fivefold.techniques._shared.calibration import windows
from fivefold.techniques._shared.modules import matrix
from fivefold.techniques._shared.passing import JointSquares
from fivefold.techniques._shared.surgeon import BLOCK, sparse_solution
from fivefold.techniques._shared.zeros import smallest_in_rows
from fivefold.techniques.inference.sparsegpt import SparseGPT
from fivefold.training.module import load_module
from fivefold.weights import read_tensors

DAMP = 1e-4


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the H of correlated inputs, as language models have them."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(4096, columns, generator=draw) @ mix * torch.linspace(0.2, 2, columns)
    return torch.randn(rows, columns, generator=draw), inputs.T @ inputs / 4096


def costs(found: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> np.ndarray:
    error = (found - weight).double()
    return ((error @ hessian.double()) * error).sum(1).numpy()


def best_under(support: np.ndarray, row: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """The least squares of one row with only `support` free, from its normal equations."""
    out = np.zeros_like(row)
    kept = np.flatnonzero(support)
    if len(kept):
        out[kept] = np.linalg.solve(hessian[np.ix_(kept, kept)], hessian[kept] @ row)
    return out


def explicit_sweep(row: np.ndarray, gone: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Optimal Brain Surgeon in a fixed order, with an explicit inverse of what is still free at every column."""
    row = row.copy()
    for j in np.flatnonzero(gone):
        inverse = np.linalg.inv(hessian[j:, j:])
        row[j:] -= row[j] / inverse[0, 0] * inverse[0]
    return row


def damped(hessian: torch.Tensor, damp: float = DAMP) -> np.ndarray:
    return (hessian.double() + damp * hessian.diagonal().mean() * torch.eye(len(hessian))).numpy()


def test_the_sweep_is_optimal_brain_surgeon_in_order():
    weight, hessian = problem(16, 8)
    found = sparse_solution(weight, hessian, 0.5, damp=DAMP)
    assert int((found == 0).sum()) == 64
    for row, before in zip(found.numpy(), weight.double().numpy(), strict=True):
        want = explicit_sweep(before, row == 0, damped(hessian))
        np.testing.assert_allclose(row, want, rtol=2e-4, atol=2e-4)


def test_refining_reaches_the_least_squares_under_the_mask():
    weight, hessian = problem(16, 8)
    found = sparse_solution(weight, hessian, 0.5, damp=DAMP, refine=30)
    for row, before in zip(found.numpy(), weight.double().numpy(), strict=True):
        np.testing.assert_allclose(row, best_under(row != 0, before, damped(hessian)), rtol=2e-3, atol=2e-3)


def test_it_is_between_the_best_of_all_masks_and_a_mask_alone():
    weight, hessian = problem(64, 8)
    masks = [np.isin(np.arange(8), kept) for kept in itertools.combinations(range(8), 4)]
    exact = hessian.double().numpy()
    best = [min(costs(torch.from_numpy(best_under(m, row, exact))[None], torch.from_numpy(row)[None], hessian)[0]
                for m in masks) for row in weight.double().numpy()]
    found = sparse_solution(weight, hessian, 0.5, "4:8", damp=DAMP)
    refined = sparse_solution(weight, hessian, 0.5, "4:8", damp=DAMP, refine=20)
    mask_only = weight.masked_fill(smallest_in_rows(weight.abs() * hessian.diagonal().sqrt(), 4), 0)
    same_mask = weight.masked_fill(found == 0, 0)
    swept, after, wanda, alone = (costs(m, weight, hessian) for m in (found, refined, mask_only, same_mask))
    assert (after >= np.array(best) - 1e-5).all() and (after <= swept * (1 + 1e-4) + 1e-6).all()
    assert np.mean(best) <= after.mean() < swept.mean() < 0.7 * wanda.mean()
    assert swept.mean() < alone.mean() and after.mean() < 2.5 * np.mean(best)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_the_number_of_zeros_is_exact_in_every_block(sparsity):
    weight, hessian = problem(12, 300, 1)
    found = sparse_solution(weight, hessian, sparsity, refine=3)
    ends = [min(s + BLOCK, 300) for s in range(0, 300, BLOCK)]
    assert [int((found[:, :e] == 0).sum()) for e in ends] == [int(sparsity * 12 * e) for e in ends]


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_patterns_hold_in_every_group(pattern, n, m):
    weight, hessian = problem(12, 136, 2)
    found = sparse_solution(weight, hessian, 0.5, pattern, refine=2)
    assert ((found == 0).view(12, -1, m).sum(2) == n).all()
    assert costs(found, weight, hessian).sum() < costs(weight.masked_fill(found == 0, 0), weight, hessian).sum()


def test_blocks_further_right_hear_of_the_error():
    """One block of 300 columns must give what three blocks give: only when a weight is chosen differs."""
    weight, hessian = problem(8, 300, 3)
    found = sparse_solution(weight, hessian, 0.3, damp=DAMP)
    for row, before in zip(found.numpy(), weight.double().numpy(), strict=True):
        np.testing.assert_allclose(row, explicit_sweep(before, row == 0, damped(hessian)), rtol=2e-3, atol=5e-4)


def test_columns_that_never_receive_anything_go_first():
    weight, hessian = problem(4, 8)
    hessian[:, :4] = hessian[:4] = 0
    found = sparse_solution(weight, hessian, 0.5, damp=1e-6)
    assert not found[:, :4].any()
    np.testing.assert_allclose(found[:, 4:], weight[:, 4:], rtol=1e-6)
    assert torch.isfinite(sparse_solution(weight, torch.zeros(8, 8), 0.5, refine=2)).all()


NAMES = {
    "llama": ("model.layers.{}.self_attn.k_proj", "model.layers.{}.mlp.down_proj"),
    "gpt2": ("transformer.h.{}.attn.c_attn", "transformer.h.{}.mlp.c_proj"),
}


@pytest.mark.parametrize("family", NAMES)
def test_each_layer_is_solved_on_what_its_treated_predecessors_give(tiny, family):
    model = tiny(family, layers=2)
    done = Recipe.parse("sparsegpt(sparsity=0.4, windows=2)").apply(model)
    tokens = torch.tensor(windows(model, 2))
    parent, pruned = load_module(model), load_module(done)
    for name in (n.format(i) for n in NAMES[family] for i in (0, 1)):
        seen = []
        part = pruned.get_submodule(name)
        with torch.no_grad(), part.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])):
            pruned(tokens)
        want = sparse_solution(matrix(parent.get_submodule(name)), JointSquares().of(seen[0]), 0.4, refine=10)
        torch.testing.assert_close(matrix(part), want, rtol=1e-3, atol=1e-4)


def test_only_linear_layers_change_and_the_count_is_reported(tiny):
    model = tiny("qwen2")
    done = Recipe.parse('sparsegpt(pattern="2:4", windows=2)').apply(model)
    before, after = dict(read_tensors(model.path)), dict(read_tensors(done.path))
    changed = {n for n in before if not np.array_equal(before[n].numpy(), after[n].numpy())}
    assert changed == {n for n in before if len(before[n].shape) == 2 and ".layers." in n}
    weights = sum(int(np.prod(before[n].shape)) for n in changed)
    assert done.coverage[-1] == (
        f"sparsegpt: 21 of 21 linear layers, {weights // 2} of {weights} weights are 0; embedding and head kept"
    )


def test_nothing_changes_at_zero(tiny):
    model = tiny()
    done = SparseGPT(sparsity=0.0, windows=1).apply(model)
    after = dict(read_tensors(done.path))
    assert all(np.array_equal(t.numpy(), after[n].numpy()) for n, t in read_tensors(model.path))


def test_what_cannot_be_is_refused(tiny):
    with pytest.raises(RecipeError, match="exactly half"):
        SparseGPT(pattern="2:4", sparsity=0.3)
    for sparsity in (1.0, -0.1):
        with pytest.raises(RecipeError, match="outside"):
            SparseGPT(sparsity=sparsity)
    with pytest.raises(Misfit, match="multiple of 8, not 68"):
        Recipe.parse('sparsegpt(pattern="4:8")').check(tiny(width=68))
