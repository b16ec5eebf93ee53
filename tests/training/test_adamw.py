"""AdamW against torch's own, its state against its formula, and both orders of work against each other."""

import math

import pytest
import torch

from fivefold.model import TrainPlan
from fivefold.training.adamw import AdamW
from fivefold.training.loop import Group, fit
from fivefold.training.optimizer import Optimizer
from fivefold.training.precision import LANES

SHAPES = [(7,), (5, 3), (LANES + 3,), (300, 300)]


def gradients(shape: tuple[int, ...], steps: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(sum(shape))
    size = torch.rand(shape, generator=draw) * 10
    return [size * torch.randn(shape, generator=draw) for _ in range(steps)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_torchs_adamw(shape: tuple[int, ...], decay: float) -> None:
    ours = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    theirs = torch.nn.Parameter(ours.clone())
    reference = torch.optim.AdamW([theirs], betas=(0.9, 0.95), eps=1e-6, weight_decay=decay)
    adamw = AdamW(betas=(0.9, 0.95), eps=1e-6, decay=decay)
    state = adamw.state(ours)
    for step, gradient in enumerate(gradients(shape, 12), start=1):
        rate = 0.01 / step
        reference.param_groups[0]["lr"] = rate
        theirs.grad = gradient.clone()
        reference.step()
        adamw.update(ours, gradient, state, {}, rate, step, None)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-7)


def test_the_first_step_is_the_rate_times_the_sign() -> None:
    weight, gradient = torch.zeros(4), torch.tensor([3.0, -0.5, 1e-3, 0.0])
    adamw = AdamW()
    adamw.update(weight, gradient, adamw.state(weight), {}, 0.1, 1, None)
    torch.testing.assert_close(weight, torch.tensor([-0.1, 0.1, -0.1, 0.0]), rtol=1e-4, atol=0)


def test_the_gradient_is_left_as_it_was() -> None:
    weight, gradient = torch.ones(4), torch.tensor([3.0, -0.5, 1e-3, 0.0])
    before = gradient.clone()
    AdamW().update(weight, gradient, AdamW().state(weight), {}, 0.1, 1, None)
    assert torch.equal(gradient, before)


@pytest.mark.parametrize(("second", "reached"), [(0.98, 0.99), (0.999, None)])
def test_averages_in_bfloat16_follow_only_when_they_forget_fast(second: float, reached: float | None) -> None:
    weight, gradient = torch.zeros(1), torch.ones(1)
    adamw = AdamW(betas=(0.9, second), dtype=torch.bfloat16)
    state = adamw.state(weight)
    for step in range(1, 10_001):
        adamw.update(weight, gradient, state, {}, 0.0, step, None)
    found = float(state["square"])
    if reached is None:
        assert found < 0.6, "the average of ones has stopped short of 1"
    else:
        assert found == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_state_is_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    adamw = AdamW(dtype=dtype)
    state = adamw.state(torch.empty(shape))
    assert adamw.state_bytes(shape) == sum(t.nbytes for t in state.values()) == 2 * dtype.itemsize * math.prod(shape)


class Watched(AdamW):
    """Notes how many gradients exist whenever a parameter is updated."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.parameters, self.most = parameters, 0

    def update(self, *given: object) -> None:
        self.most = max(self.most, sum(p.grad is not None for p in self.parameters))
        super().update(*given)  # type: ignore[arg-type]


def fitted(fused: bool) -> tuple[list[torch.Tensor], int]:
    layers = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(4)))
    draw = torch.Generator().manual_seed(0)
    for p in layers.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=draw)
    x = torch.randn(8, 6, generator=draw)
    parameters = dict(layers.named_parameters())
    optimizer = Watched(list(parameters.values()))
    fit(TrainPlan(steps=6, learning_rate=0.01), [Group(parameters=parameters)],
        lambda batch: 0.01 * (layers(x) - 1).square().mean(), lambda step: [(None, 1.0)],
        lambda: 0.01 * float((layers(x) - 1).square().mean().detach()), optimizer=optimizer, fused=fused)
    return [p.detach().clone() for p in parameters.values()], optimizer.most


def test_both_orders_of_work_give_the_same_and_the_fused_one_holds_no_gradients() -> None:
    (whole, held), (fused, most) = fitted(False), fitted(True)
    assert all(torch.equal(a, b) for a, b in zip(whole, fused, strict=True))
    assert held == 8 and most == 0


def test_an_optimiser_without_gradients_says_how_it_steps() -> None:
    with pytest.raises(NotImplementedError):
        Optimizer().without_gradients(lambda: 0.0, {}, {}, {}, 1)
