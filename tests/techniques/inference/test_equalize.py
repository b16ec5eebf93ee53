from __future__ import annotations

import numpy as np
import pytest
import torch

from fivefold.errors import Misfit
from fivefold.recipe import Recipe
from fivefold.techniques._shared.calibration import windows
from fivefold.techniques._shared.column_scales import Columns, best, loss
from fivefold.techniques.inference.equalize import Equalize, columns
from fivefold.training.module import load_module
from fivefold.weights import read_tensors, write_safetensors


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return load_module(model, torch.float32)(torch.arange(2, 60)[None]).logits[0].numpy()


def stored(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in read_tensors(model.path)}


def made_up(seed: int, size: int = 64) -> Columns:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(2, size, generator=draw, dtype=torch.float64).exp()
    return Columns(cost=values[0] ** 3, squares=values[1])


def test_one_matrix_has_the_closed_form() -> None:
    one = made_up(0)
    found, left = best([one], 32)
    want = (one.cost / one.squares) ** 0.25
    ratio = (found / want).view(-1, 32)
    assert float((ratio / ratio.mean(1, keepdim=True) - 1).abs().max()) < 1e-3, "blocks may differ by a factor"
    blocks = (one.cost * one.squares).sqrt().view(-1, 32).mean(1).square().sum()
    assert left == pytest.approx(float(blocks / loss(torch.ones(64), [one], 32)), rel=1e-6)


def test_shared_scales_are_the_least_of_all_neighbours() -> None:
    many = [made_up(seed) for seed in range(3)]
    found, left = best(many, 32)
    assert left < 0.8
    least = float(loss(found, many, 32))
    draw = torch.Generator().manual_seed(9)
    for size in (0.01, 0.1, 1.0):
        for _ in range(20):
            other = found * (size * torch.randn(64, generator=draw, dtype=torch.float64)).exp()
            assert float(loss(other, many, 32)) > least


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_function_is_the_parents(tiny, family, tied):
    model = tiny(family, tied=tied)
    done = Equalize(windows=2).apply(model)
    np.testing.assert_allclose(logits(done), logits(model), atol=1e-4)
    before, after = stored(model), stored(done)
    changed = {n for n in before if not np.allclose(before[n], after[n])}
    assert {n.split(".", 3)[-1] for n in changed} >= {
        "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_proj.weight", "mlp.up_proj.weight",
        "self_attn.v_proj.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight", "mlp.gate_proj.weight",
    }
    assert not {n for n in changed if "layers." not in n}
    assert done.blueprint == model.blueprint and "12 scalings folded into 3 of 3 layers" in done.coverage[-1]


def test_the_scales_are_those_of_the_curvature(tiny):
    """Oracle: down's columns by the closed form, up's rows their inverse."""
    model = tiny("llama", layers=2)
    technique = Equalize(windows=2)
    known = columns(model, windows(model, 2, 512))
    before, after = stored(model), stored(technique.apply(model))
    for layer in range(2):
        at = f"model.layers.{layer}.mlp."
        scales = (after[f"{at}down_proj.weight"] / before[f"{at}down_proj.weight"])[0]
        rows = (before[f"{at}up_proj.weight"] / after[f"{at}up_proj.weight"])[:, 0]
        np.testing.assert_allclose(rows / rows.mean(), scales / scales.mean(), rtol=1e-3)
        one = known[layer]["down"]
        ratio = (scales / ((one.cost / one.squares) ** 0.25).numpy()).reshape(-1, 32)
        np.testing.assert_allclose(ratio / ratio.mean(1, keepdims=True), 1, atol=2e-2)


def test_the_shipped_file_loses_less(tiny):
    """With columns of very different use, rounding after it is nearer to the parent's answers."""
    from fivefold.engines._quantize import dequantize, quantize

    model = tiny("llama", tied=False, layers=2)
    uneven = np.exp(np.random.default_rng(0).uniform(-2, 2, 64)).astype(np.float32)
    changes = {n: (t * uneven if "norm" in n else t / uneven) for n, t in stored(model).items()
               if "layernorm" in n or any(p in n for p in ("q_proj.w", "k_proj.w", "v_proj.w", "gate_proj", "up_proj"))}
    write_safetensors(model.path / "model.safetensors", {**stored(model), **changes})

    def lost(one) -> float:
        module = load_module(one, torch.float32)
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2 and ".layers." in name:
                matrix = parameter.detach().numpy()
                parameter.data = torch.from_numpy(dequantize(quantize(matrix, "q4_0"), "q4_0", matrix.shape))
        with torch.no_grad():
            ours = module(torch.arange(2, 60)[None]).logits[0].log_softmax(-1)
        theirs = torch.from_numpy(logits(model)).log_softmax(-1)
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    assert lost(Equalize(windows=4).apply(model)) < 0.6 * lost(model)


def test_it_comes_after_pruning_and_before_rounding_and_refuses_what_it_does_not_know(tiny):
    recipe = Recipe.parse('gguf(type="q4_0") + equalize + wanda + prune_depth(layers=1)')
    assert [t.name for t in recipe] == ["prune_depth", "wanda", "equalize", "gguf"]
    with pytest.raises(Misfit, match="not of gpt2"):
        Equalize().check(tiny("gpt2"))
    with pytest.raises(Misfit, match="blocks of 128 do not divide rows of 64"):
        Equalize(block=128).check(tiny("llama"))
