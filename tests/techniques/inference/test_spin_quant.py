from __future__ import annotations

import numpy as np
import pytest
import torch

from fivefold.engines._quantize import dequantize, quantize
from fivefold.errors import Misfit
from fivefold.recipe import Recipe
from fivefold.techniques._shared.rotation import Rotation, fold, random_start, unties
from fivefold.techniques._shared.turning import Cayley, Turned, orthogonal, rounding
from fivefold.techniques.inference.spin_quant import SpinQuant
from fivefold.training.distill import forward_kl
from fivefold.training.module import load_module
from fivefold.weights import read_tensors, write_safetensors

TOKENS = torch.arange(2, 90)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return load_module(model, torch.float32)(TOKENS).logits


def spiky(model):
    """With outlier columns, as real models have and random ones have not."""
    tensors = {n: t.numpy().copy() for n, t in read_tensors(model.path)}
    for name, tensor in tensors.items():
        if "up_proj" in name or "o_proj" in name:
            tensor[:, [3, 17]] *= 9
    write_safetensors(model.path / "model.safetensors", tensors)
    return model


def test_a_cayley_step_stays_orthogonal_and_goes_downhill():
    """min |R - T|^2 over rotations, T a rotation: descent must find T."""
    draw = torch.Generator().manual_seed(0)
    target = torch.matrix_exp(0.3 * (a := torch.randn(2, 12, 12, generator=draw, dtype=torch.float64)) - 0.3 * a.mT)
    turn = torch.eye(12).repeat(2, 1, 1)
    cayley, state = Cayley(), Cayley().state(turn)
    losses = []
    for step in range(200):
        losses.append(float((turn - target).square().sum()))
        cayley.update(turn, (turn - target).float(), state, {}, 0.05 * (1 - step / 200), step + 1, None)
    assert losses[-1] < 1e-3 * losses[0]
    np.testing.assert_allclose((turn @ turn.mT).numpy(), np.eye(12)[None].repeat(2, 0), atol=1e-4)
    kept = orthogonal(turn)
    np.testing.assert_allclose((kept @ kept.mT).numpy(), np.eye(12)[None].repeat(2, 0), atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("residual", [True, False])
def test_the_turned_and_rounded_model_is_that_of_the_folder(tiny, family, residual):
    """Oracle: fold the same rotation into a folder, round its matrices with ggml, run it without any of `turning`."""
    model = tiny(family, tied=False)
    start = random_start(model.blueprint, 3, residual=residual)
    with torch.no_grad():
        ours = Turned(load_module(model, torch.float32), start, "q4_0").logits(TOKENS)
    folded, _ = fold(model, "spin_quant", start)
    module = load_module(folded, torch.float32)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2 and (residual or "v_proj" in name or "o_proj" in name):
            matrix = parameter.detach().numpy()
            parameter.data = torch.from_numpy(dequantize(quantize(matrix, "q4_0"), "q4_0", matrix.shape))
    with torch.no_grad():
        theirs = module(TOKENS).logits
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=5e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gradients_are_those_of_finite_differences_where_nothing_is_rounded(tiny, family):
    model = tiny(family, tied=False, layers=2)
    turned = Turned(load_module(model, torch.float32), random_start(model.blueprint, 0, residual=True), "q4_0")
    turned.rounded = lambda matrix: matrix.detach().clone()
    wanted = turned.exact(TOKENS) * 1.3

    def loss() -> torch.Tensor:
        return (turned.logits(TOKENS) - wanted).square().mean()

    loss().backward()
    draw = torch.Generator().manual_seed(5)
    for parameter in turned.rotations().values():
        direction = torch.randn(parameter.shape, generator=draw)
        slope = float((parameter.grad * direction).sum())
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * 2e-4)
                values.append(float(loss()))
                parameter.add_(direction, alpha=-sign * 2e-4)
        assert slope == pytest.approx((values[0] - values[1]) / 4e-4, rel=0.02, abs=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_learned_rotations_keep_the_function_and_round_better_than_random_ones(tiny, tied, residual):
    model = spiky(tiny("llama", tied=tied))
    technique = SpinQuant(steps=24, tokens=256, residual=residual)
    done = technique.apply(model)
    np.testing.assert_allclose(logits(done).numpy(), logits(model).numpy(), atol=1e-4)
    assert done.blueprint == technique.plan(model).blueprint
    assert done.blueprint.tied == (tied and not (residual and unties(model)))

    def lost(folder) -> float:
        module = load_module(folder, torch.float32)
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2 and (residual or "v_proj" in name or "o_proj" in name):
                parameter.data = rounding("q4_0")(parameter.detach())
        with torch.no_grad():
            held_out = torch.as_tensor(technique._text(model)[1])
            parent = load_module(model, torch.float32)
            return float(forward_kl(module(held_out).logits, parent(held_out).logits))

    random, _ = fold(model, "random", random_start(model.blueprint, technique.seed, residual=residual))
    assert lost(done) < 0.97 * lost(random)
    assert "held-out KL as q4_0" in done.coverage[-1]


def test_the_rotation_that_is_folded_is_orthogonal(tiny):
    model = tiny("llama", tied=False)
    turned = Turned(load_module(model, torch.float32), random_start(model.blueprint, 0, residual=True), "q4_0")
    with torch.no_grad():
        turned.residual.add_(1e-4 * torch.randn(64, 64))
    found: Rotation = turned.rotation()
    np.testing.assert_allclose((found.residual @ found.residual.T).numpy(), np.eye(64), atol=1e-12)


def test_what_cannot_be_is_refused(tiny):
    with pytest.raises(Misfit, match="cannot turn gpt2"):
        SpinQuant().check(tiny("gpt2"))
    with pytest.raises(Misfit, match="rows of 80"):
        SpinQuant().check(tiny("llama", width=80))
    assert [t.name for t in Recipe.parse('gguf(type="q4_0") + spin_quant')] == ["spin_quant", "gguf"]
