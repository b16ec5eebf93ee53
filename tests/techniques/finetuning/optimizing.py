"""What the tests of optimisers share: runs of a tiny model by recipe, and checks that hold for each of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from masked import assert_same, planned, resumed, trained

from fivefold.model import Model, TrainPlan
from fivefold.training.loop import Group, fit
from fivefold.training.method import Methods
from fivefold.training.optimizer import Optimizer
from fivefold.training.precision import State

SHAPES = [(5,), (3, 4), (96, 64), (64, 96), (300, 257), (70_000,)]


def optimizer_of(recipe: str, model: Model) -> Optimizer:
    plan = planned(model, recipe).train
    update = Methods.of(plan).update
    assert update is not None
    return update.optimizer(plan)


def state_is_the_formula(optimizer: Optimizer) -> None:
    for shape in SHAPES:
        state = optimizer.state(torch.zeros(shape))
        assert sum(t.nbytes for t in state.values()) == optimizer.state_bytes(shape), shape


def run_state_is_the_formula(model: Model, recipe: str, folder: Path) -> None:
    """What a run of the recipe holds at its end is what the memory formula foretells."""
    plan = planned(model, recipe).train
    methods = Methods.of(plan)
    assert methods.update is not None and methods.adaptation is not None
    optimizer = methods.update.optimizer(plan)
    shapes = methods.adaptation.shapes(model.blueprint)
    expected = sum(optimizer.state_bytes(s) for s in optimizer.at_once(shapes).values())
    assert trained(model, recipe, folder).fitted.state_bytes == expected


def learns(model: Model, recipe: str, folder: Path, *, by: float = 0.1) -> None:
    """The loss falls by at least a share of what it was, in the steps and on held-out rows."""
    fitted = trained(model, recipe, folder).fitted
    first, last = sum(fitted.losses[:3]) / 3, sum(fitted.losses[-3:]) / 3
    assert last < (1 - by) * first, (first, last)
    assert fitted.after < (1 - by / 2) * fitted.before


def resumes_exactly(model: Model, recipe: str, folder: Path, stop: int) -> None:
    through, again = trained(model, recipe, folder / "through"), resumed(model, recipe, folder, stop)
    assert again.fitted.losses == through.fitted.losses
    assert_same(again.model, through.model)


def matrices(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"layers.0.a": (24, 40), "layers.1.b": (40, 24), "c": (24,)}
    return {n: torch.nn.Parameter(torch.randn(s, generator=draw) / math.sqrt(s[0])) for n, s in shapes.items()}


def toy(optimizer: Optimizer, *, rate: float, steps: int = 20, fused: bool = False) -> tuple[float, list[torch.Tensor]]:
    """A small regression: (share of the loss left at the end, the parameters). Gradients stay below norm 1."""
    parameters = matrices()
    first, second, third = parameters.values()
    draw = torch.Generator().manual_seed(9)
    x, target = torch.randn(32, 40, generator=draw), torch.randn(32, 40, generator=draw)

    def loss(_: Any = None) -> torch.Tensor:
        return 0.05 * ((x @ first.T).tanh() * third @ second.T - target).square().mean()

    done = fit(TrainPlan(steps=steps, learning_rate=rate), [Group(parameters=parameters)], loss,
               lambda step: [(None, 1.0)], lambda: float(loss().detach()), optimizer=optimizer, fused=fused)
    return done.after / done.before, [p.detach().clone() for p in parameters.values()]


def both_orders_agree(make: Any, rate: float) -> None:
    (_, whole), (_, fused) = toy(make(), rate=rate), toy(make(), rate=rate, fused=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, fused, strict=True))


def stays_where_gradients_are_zero(optimizer: Optimizer, shape: tuple[int, ...], rate: float) -> None:
    """Every other row has no gradient in any step: `by_number`."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before, state = weight.clone(), optimizer.state(weight)
    draw = torch.Generator().manual_seed(2)
    for step in range(1, 8):
        gradient = torch.randn(shape, generator=draw)
        gradient[::2] = 0
        optimizer.update(weight, gradient, state, {}, rate, step, None)
    assert torch.equal(weight[::2], before[::2])
    assert bool((weight[1::2] != before[1::2]).any())


def updated(
    optimizer: Optimizer, weight: torch.Tensor, gradients: list[torch.Tensor], rate: float
) -> tuple[torch.Tensor, State]:
    weight, state = weight.clone(), optimizer.state(weight)
    for step, gradient in enumerate(gradients, start=1):
        before = gradient.clone()
        optimizer.update(weight, gradient, state, {}, rate, step, None)
        assert torch.equal(gradient, before), "an update leaves the gradient as it was"
    return weight, state


def gaussians(shape: tuple[int, ...], count: int, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) for _ in range(count)]
