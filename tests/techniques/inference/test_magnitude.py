from __future__ import annotations

import numpy as np
import pytest
import torch

from fivefold.errors import Misfit, RecipeError
from fivefold.recipe import Recipe
from fivefold.techniques._shared.zeros import smallest
from fivefold.techniques.inference.magnitude import Magnitude
from fivefold.weights import read_tensors


def pruned(model, text: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> matrix before and after, of every linear layer; all other tensors must be as they were."""
    done = Recipe.parse(text).apply(model)
    after = {n: t.numpy() for n, t in read_tensors(done.path)}
    found = {}
    for name, tensor in read_tensors(model.path):
        if len(tensor.shape) == 2 and (".layers." in name or ".h." in name):
            found[name] = (tensor.numpy(), after[name])
        else:
            np.testing.assert_array_equal(tensor.numpy(), after[name])
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_smallest_of_every_whole_matrix_go_and_the_others_stay(tiny, family):
    for before, after in pruned(tiny(family), "magnitude(sparsity=0.3)").values():
        gone = after == 0
        assert gone.sum() == int(before.size * 0.3)
        assert np.abs(before[gone]).max() <= np.abs(before[~gone]).min()
        np.testing.assert_array_equal(after[~gone], before[~gone])
        assert len(set(gone.sum(1))) > 1, "rows are not pruned alike"


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_patterns_keep_the_largest_of_each_group(tiny, pattern, n, m):
    for before, after in pruned(tiny("qwen2"), f'magnitude(pattern="{pattern}")').values():
        for group, left in zip(before.reshape(-1, m), after.reshape(-1, m), strict=True):
            want = group.copy()
            want[np.argsort(np.abs(group), kind="stable")[:n]] = 0
            np.testing.assert_array_equal(left, want)


def test_the_count_is_reported(tiny):
    model = tiny()
    done = Magnitude(sparsity=0.5).apply(model)
    matrices = [t.shape for n, t in read_tensors(model.path) if len(t.shape) == 2 and ".layers." in n]
    weights = sum(r * c for r, c in matrices)
    assert done.coverage[-1] == (
        f"magnitude: 21 of 21 linear layers, {weights // 2} of {weights} weights are 0; embedding and head kept"
    )


def test_nothing_is_pruned_at_zero(tiny):
    for before, after in pruned(tiny(), "magnitude(sparsity=0.0)").values():
        np.testing.assert_array_equal(before, after)


def test_what_cannot_be_is_refused(tiny):
    with pytest.raises(RecipeError, match="exactly half"):
        Magnitude(pattern="2:4", sparsity=0.3)
    for sparsity in (1.0, -0.1):
        with pytest.raises(RecipeError, match="outside"):
            Magnitude(sparsity=sparsity)
    with pytest.raises(Misfit, match="multiple of 8, not 68"):
        Recipe.parse('magnitude(pattern="4:8")').check(tiny(width=68))
    with pytest.raises(Misfit, match="dense weights"):
        Recipe.parse("magnitude + wanda")


def test_of_equal_scores_the_first_places_go():
    draw = torch.Generator().manual_seed(0)
    for shape in ((7,), (5, 6), (30, 40)):
        scores = torch.randint(0, 6, shape, generator=draw).float()
        for count in (0, 1, scores.numel() // 3, scores.numel()):
            want = np.zeros(scores.numel(), bool)
            want[np.argsort(scores.numpy().reshape(-1), kind="stable")[:count]] = True
            np.testing.assert_array_equal(smallest(scores, count).numpy().reshape(-1), want)
