"""Shares of zeros per layer, against the definition written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fivefold.errors import RecipeError
from fivefold.recipe import Recipe
from fivefold.techniques._shared.calibration import windows
from fivefold.techniques._shared.modules import linears, matrix
from fivefold.techniques._shared.outliers import outlier_weighed, spread
from fivefold.training.module import load_module
from fivefold.weights import read_tensors


def test_the_mean_is_kept_and_the_order_turned():
    outliers, weights = {0: 0.01, 1: 0.05, 2: 0.03}, {0: 100.0, 1: 100.0, 2: 400.0}
    shares = spread(outliers, weights, 0.5)
    assert shares[0] > shares[2] > shares[1]
    assert shares[0] - shares[1] == pytest.approx(0.16)
    assert sum(shares[n] * weights[n] for n in shares) / 600 == pytest.approx(0.5)
    assert spread({0: 0.02, 1: 0.02}, {0: 1.0, 1: 1.0}, 0.5) == {0: 0.5, 1: 0.5}
    assert all(0 <= s <= 0.99 for s in spread(outliers, weights, 0.99).values())


def test_outliers_are_counted_on_the_untreated_model(tiny):
    model = tiny("qwen2", layers=3)
    module, tokens = load_module(model), windows(model, 2)
    part = module.get_submodule("model.layers.1.mlp.up_proj")
    part.weight.data[:4] *= 50
    before = {n: p.weight.data.clone() for n, p in linears(module)}
    inputs: dict[str, np.ndarray] = {}
    handles = [
        p.register_forward_pre_hook(lambda _, args, n=n: inputs.update({n: args[0].numpy().astype(np.float64)}))
        for n, p in linears(module)
    ]
    with torch.no_grad():
        module(torch.tensor(tokens))
    for handle in handles:
        handle.remove()
    shares = outlier_weighed(module, tokens, 0.4)
    assert all(torch.equal(p.weight.data, before[n]) for n, p in linears(module))
    found = {}
    for number in range(3):
        scores = []
        for name, p in linears(module):
            if f".{number}." in name:
                norms = np.sqrt((inputs[name].reshape(-1, inputs[name].shape[-1]) ** 2).mean(0))
                scores.append((np.abs(matrix(p).numpy()) * norms).ravel())
        every = np.concatenate(scores)
        found[number] = float((every > 5 * every.mean()).mean())
    want = spread(found, dict.fromkeys(found, 1.0), 0.4)
    for name, share in shares.items():
        assert share == pytest.approx(want[int(name.split(".")[2])], abs=1e-6)
    assert shares["model.layers.1.mlp.up_proj"] == min(shares.values()) < 0.4


@pytest.mark.parametrize("technique", ["wanda", "sparsegpt"])
def test_layers_lose_different_shares_and_the_model_what_was_asked(tiny, technique):
    model = tiny("qwen2", layers=3)
    done = Recipe.parse(f'{technique}(sparsity=0.5, allocation="owl", windows=2)').apply(model)
    zeros = dict.fromkeys(range(3), 0)
    total = 0
    for name, tensor in read_tensors(done.path):
        if ".layers." in name and len(tensor.shape) == 2:
            zeros[int(name.split(".")[2])] += int((tensor.numpy() == 0).sum())
            total += int(np.prod(tensor.shape))
    assert sum(zeros.values()) == pytest.approx(total / 2, rel=0.02)
    assert max(zeros.values()) - min(zeros.values()) == pytest.approx(0.16 * total / 3, rel=0.15)
    with pytest.raises(RecipeError, match="leave allocation out"):
        Recipe.parse(f'{technique}(pattern="2:4", allocation="owl")')
