"""MeZO: its estimate is right on average, its weights come back, and it needs the memory of inference."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from masked import planned, pupil, trained
from optimizing import learns, resumes_exactly

from fivefold.errors import Misfit
from fivefold.model import TrainPlan
from fivefold.training.loop import Group, fit
from fivefold.training.optimizers.mezo import MeZO
from fivefold.training.precision import State, carry, read, write

DRAWS = 4000


def estimates(loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, eps: float) -> torch.Tensor:
    """g z of many draws, each from the same point: (DRAWS, weights)."""
    weight, mezo, out = torch.nn.Parameter(start.clone()), MeZO(eps=eps, seed=3), []
    for step in range(1, DRAWS + 1):
        weight.data.copy_(start)
        mezo.without_gradients(lambda: float(loss(weight.data.double())), {"w": weight}, {"w": {}}, {"w": 1.0}, step)
        out.append(start - weight.data)
    return torch.stack(out).double()


def assert_mean(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = found.std(0) / math.sqrt(len(found))
    assert float(((found.mean(0) - expected) / error).abs().max()) < 4
    assert float(error.max()) < 0.1 * float(expected.norm()), "the test can tell a gradient from none"


def test_the_estimate_is_unbiased_for_logistic_regression() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=draw).double(), torch.randint(0, 2, (40,), generator=draw).double()
    start = torch.randn(5, generator=draw)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y)

    there = start.double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(there), there)
    assert_mean(estimates(loss, start, 1e-3), gradient)


def test_its_mean_is_the_gradient_of_the_smoothed_loss() -> None:
    """E sum (w + eps z)^3 = sum w^3 + 3 eps^2 w, whose gradient is 3 w^2 + 3 eps^2."""
    start, eps = torch.tensor([0.1, -0.2, 0.05]), 0.5
    found = estimates(lambda w: (w**3).sum(), start, eps)
    assert_mean(found, 3 * start.double() ** 2 + 3 * eps**2)


def test_the_variance_is_that_of_one_random_direction() -> None:
    """Of g z with g = (a, z): E |g z|^2 = (weights + 2) |a|^2."""
    slope = torch.tensor([1.0, -2.0, 0.5, 3.0])
    found = estimates(lambda w: (slope.double() * w).sum(), torch.zeros(4), 1e-2)
    assert float(found.square().sum(1).mean()) == pytest.approx(6 * float(slope.square().sum()), rel=0.1)


@pytest.mark.parametrize("held", ["float32", "split"])
def test_weights_come_back_bit_for_bit(held: str) -> None:
    draw = torch.Generator().manual_seed(1)
    scale = torch.logspace(-6, 1, 70_000)
    value = scale * torch.randn(70_000, generator=draw)
    weight = torch.nn.Parameter(torch.zeros(70_000, dtype=torch.float32 if held == "float32" else torch.bfloat16))
    near: State = carry(weight.data, held)  # type: ignore[arg-type]
    write(weight.data, value.clone(), near, None)
    mezo, seen = MeZO(eps=1e-3), []

    def step(number: int) -> torch.Tensor:
        def loss() -> float:
            seen.append(read(weight.data, near).clone())
            return float(len(seen))

        mezo.without_gradients(loss, {"w": weight}, {"w": near}, {"w": 0.0}, number)
        return read(weight.data, near).clone()

    first = step(1)
    assert float((first - value).abs().max()) <= mezo.grid(weight.data) / 2 <= 2.0**-23 * float(value.abs().max())
    for number in range(2, 40):
        assert torch.equal(step(number).view(torch.int32), first.view(torch.int32))
    above, below = seen[-2], seen[-1]
    torch.testing.assert_close((above + below) / 2, first, rtol=0, atol=2.0**-22 * float(value.abs().max()))
    noise = (above - below) / 2e-3
    assert float(noise.mean()) == pytest.approx(0, abs=0.02) and float(noise.std()) == pytest.approx(1, abs=0.02)


def test_the_step_is_along_the_noise_by_the_slope() -> None:
    weight, mezo, seen = torch.nn.Parameter(torch.zeros(50)), MeZO(eps=1e-2), []
    slope = torch.linspace(-1, 1, 50)

    def loss() -> float:
        seen.append(weight.data.clone())
        return float((slope * weight.data).sum())

    middle = mezo.without_gradients(loss, {"w": weight}, {"w": {}}, {"w": 0.1}, 1)
    z = (seen[0] - seen[1]) / 2e-2
    torch.testing.assert_close(weight.data, -0.1 * (slope @ z) * z, rtol=1e-3, atol=1e-4)
    assert middle == pytest.approx(0, abs=1e-5)


def test_every_parameter_and_every_step_has_its_own_noise() -> None:
    named = {name: torch.nn.Parameter(torch.zeros(500)) for name in "ab"}
    seen: list[torch.Tensor] = []

    def loss() -> float:
        seen.extend(p.data.clone() for p in named.values())
        return 0.0

    for step in (1, 2):
        MeZO(eps=1.0).without_gradients(loss, named, {name: {} for name in named}, dict.fromkeys(named, 0.0), step)
    rolls = torch.stack([seen[0], seen[1], seen[4], seen[5]])
    assert float((torch.corrcoef(rolls) - torch.eye(4)).abs().max()) < 0.2


def test_a_small_problem_is_learned_without_gradients() -> None:
    draw = torch.Generator().manual_seed(0)
    x, truth = torch.randn(64, 8, generator=draw), torch.randn(8, generator=draw)
    w = torch.nn.Parameter(torch.zeros(8))

    def loss(_: object = None) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return (x @ (w - truth)).square().mean()

    with torch.no_grad():
        done = fit(TrainPlan(steps=400, learning_rate=0.02), [Group(parameters={"w": w})], loss,
                   lambda step: [(None, 1.0)], lambda: float(loss()), optimizer=MeZO(eps=1e-3))
    assert done.after < 0.01 * done.before and done.state_bytes == 0 and w.grad is None
    torch.testing.assert_close(w.detach(), truth, atol=0.2, rtol=0)


def test_it_learns_and_resumes_exactly(tmp_path: Path) -> None:
    learns(pupil(tmp_path, steps=80, dtype="bfloat16"), "mezo(rate=3e-4)", tmp_path / "run", by=0.05)
    resumes_exactly(pupil(tmp_path / "b", dtype="bfloat16"), "lora() + mezo()", tmp_path / "resumed", stop=4)
    assert trained(pupil(tmp_path / "c"), "lora() + mezo()", tmp_path / "lora").fitted.state_bytes == 0


def test_its_rate_is_its_own(tmp_path: Path) -> None:
    rates = [planned(pupil(tmp_path / str(i)), text).train.learning_rate
             for i, text in enumerate(("mezo()", "lora() + mezo()", "mezo(rate=0.01)"))]
    assert rates == [1e-6, 1e-4, 0.01]


@pytest.mark.parametrize(("recipe", "reason"), [
    ('full(held="kahan") + mezo()', "there and back"),
    ("diff_pruning() + mezo()", "remove one"),
    ("child_tuning() + mezo()", "remove one"),
    ("mezo() + checkpoint_activations()", "activation memory"),
    ("mezo() + offload()", "activation memory"),
])
def test_what_it_does_not_go_with_is_refused(tmp_path: Path, recipe: str, reason: str) -> None:
    with pytest.raises(Misfit, match=reason):
        planned(pupil(tmp_path), recipe)
