"""Hard-concrete gates against their closed form, finite differences, and autograd of the plain formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fivefold.techniques._shared.gates import LEFT, RIGHT, Draws, expected_open, gate, install
from fivefold.training import lean

DRAWS = 200_000


@pytest.mark.parametrize("openness", [-3.0, -0.5, 0.0, 1.0, 5.0])
def test_gates_are_exactly_zero_and_one_as_often_as_the_closed_form_says(openness: float) -> None:
    noise = torch.rand(DRAWS, generator=torch.Generator().manual_seed(1))
    z, _ = gate(torch.full((DRAWS,), openness), noise)
    for found, probability in (
        (z == 0, 1 / (1 + math.exp(openness - math.log(-LEFT / RIGHT)))),
        (z == 1, 1 / (1 + math.exp(math.log((1 - LEFT) / (RIGHT - 1)) - openness))),
    ):
        spread = math.sqrt(probability * (1 - probability) / DRAWS)
        assert abs(float(found.float().mean()) - probability) < 4 * spread + 1e-6
    assert ((z >= 0) & (z <= 1)).all()


def test_the_penalty_is_the_expected_number_of_open_gates() -> None:
    openness = torch.linspace(-3, 3, 7)
    noise = torch.rand(DRAWS, 7, generator=torch.Generator().manual_seed(2))
    often = (gate(openness.expand(DRAWS, 7), noise)[0] > 0).sum() / DRAWS
    assert float(expected_open(openness)) == pytest.approx(float(often), abs=0.02)


def test_the_penalty_s_gradient_is_that_of_finite_differences() -> None:
    openness = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: 3 * expected_open(a), (openness,))
    (3 * expected_open(openness)).backward()
    small = 1e-6
    for i in range(9):
        step = torch.zeros(9, dtype=torch.float64)
        step[i] = small
        with torch.no_grad():
            slope = 3 * (expected_open(openness + step) - expected_open(openness - step)) / (2 * small)
        assert float(openness.grad[i]) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("noisy", [True, False])
def test_the_gate_s_slope_is_that_of_finite_differences(noisy: bool) -> None:
    openness = torch.linspace(-6, 6, 100, dtype=torch.float64)
    noise = torch.rand(100, generator=torch.Generator().manual_seed(3), dtype=torch.float64) if noisy else None
    _, slope = gate(openness, noise)
    ahead, behind = gate(openness + 1e-6, noise)[0], gate(openness - 1e-6, noise)[0]
    torch.testing.assert_close(slope, (ahead - behind) / 2e-6, atol=1e-6, rtol=1e-6)
    assert (slope == 0).any() and (slope > 0).any()


def plain(part, x: torch.Tensor) -> torch.Tensor:
    """The layer by autograd of the formula, gates drawn as the layer does."""
    if part.draws.fixed:
        z = torch.ones_like(part.openness)
    else:
        noise = part.draws.uniform(part.openness.shape, part.layer, x.device)
        noise = noise.clamp(1e-7, 1 - 1e-7)
        logits = part.openness + (noise.log() - torch.log1p(-noise) if part.training else 0.0)
        z = (torch.sigmoid(logits) * (RIGHT - LEFT) + LEFT).clamp(0, 1)
    whole = part.weight + z * part.change
    return F.linear(x, whole if isinstance(part, torch.nn.Linear) else whole.T, part.bias)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("mode", ["train", "eval", "fixed"])
@pytest.mark.parametrize("marked", [True, False])
def test_a_layer_and_its_gradients_are_those_of_the_formula(kind: str, mode: str, marked: bool) -> None:
    torch.manual_seed(0)
    part = torch.nn.Linear(12, 7) if kind == "linear" else Conv1D(7, 12)
    part.requires_grad_(False)
    install(part, 3, Draws.of(5), 0.3)
    part.change.data.normal_()
    part.openness.data.normal_()
    part.train(mode != "eval")
    part.draws.fixed.fill_(mode == "fixed")
    gain = torch.rand(12)
    found = []
    for forward in (type(part).forward, plain):
        h = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        x = lean.norm(h, gain, 1e-6) if marked else h * 1.0
        y = forward(part, x)
        part.change.grad = part.openness.grad = None
        y.square().sum().backward()
        found.append((y, h.grad, part.change.grad, part.openness.grad))
    for ours, theirs in zip(*found, strict=True):
        if ours is None:
            assert mode == "fixed" and not (theirs is not None and theirs.any())
        else:
            torch.testing.assert_close(ours, theirs)
    assert mode == "eval" or part.change.grad.any()
    assert part.weight.grad is None


def test_a_new_layer_computes_what_it_did() -> None:
    part, x = torch.nn.Linear(6, 4), torch.randn(3, 6)
    before = part(x)
    install(part, 0, Draws.of(0), 5.0)
    torch.testing.assert_close(part(x), before)


def test_draws_depend_on_seed_step_and_layer_alone() -> None:
    shape, device = torch.Size([50]), torch.device("cpu")
    draws = Draws.of(1)
    first = draws.uniform(shape, 2, device)
    torch.manual_seed(99)
    assert torch.equal(first, draws.uniform(shape, 2, device))
    others = [Draws.of(2).uniform(shape, 2, device), draws.uniform(shape, 3, device)]
    draws.step.fill_(1)
    others.append(draws.uniform(shape, 2, device))
    assert all(not torch.equal(first, other) for other in others)
