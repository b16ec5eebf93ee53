"""The loop on problems with a known answer."""

import math

import numpy as np
import pytest
import torch

from fivefold.errors import NotFinite
from fivefold.model import TrainPlan
from fivefold.training.distill import forward_kl
from fivefold.training.loop import Group, batches, fit, rate_at

TOKENS = np.arange(64).reshape(16, 4)


def plan(**changes: object) -> TrainPlan:
    return TrainPlan(**{"steps": 200, "tokens_per_step": 16, "sequence": 4, "learning_rate": 0.1, **changes})


def line() -> tuple[torch.nn.Parameter, object]:
    weight = torch.nn.Parameter(torch.zeros(2))

    def loss(rows: np.ndarray) -> torch.Tensor:
        x = torch.as_tensor(rows).double().flatten() / 64
        return (weight[0] * x + weight[1] - (3 * x - 1)).square().mean()

    return weight, loss


def test_finds_the_line() -> None:
    weight, loss = line()
    done = fit(plan(), [Group(parameters=[weight])], loss, TOKENS, lambda: float(loss(TOKENS).detach()))
    np.testing.assert_allclose(weight.detach().numpy(), [3, -1], atol=0.15)
    assert done.after < 0.01 * done.before
    assert done.steps == 200 and done.tokens == 200 * 16


def test_accumulation_equals_one_large_batch() -> None:
    ends = []
    for at_once in (1, 4):
        weight, loss = line()
        fit(plan(steps=5), [Group(parameters=[weight])], loss, TOKENS, lambda w=weight: -float(w.detach()[0]),
            at_once=at_once)
        ends.append(weight.detach().clone())
    torch.testing.assert_close(*ends)


def test_the_best_state_is_kept_when_training_harms() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    done = fit(plan(steps=8), [Group(parameters=[weight])], lambda rows: -weight.square().sum(), TOKENS,
               lambda: float(weight.detach().square().sum()))
    assert done.best_step == 0 and done.after == done.before
    torch.testing.assert_close(weight.detach(), torch.ones(3))


def test_groups_learn_at_their_own_rate() -> None:
    fast, slow = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    fit(plan(steps=3, learning_rate=1e-3), [Group(parameters=[fast], rate=10), Group(parameters=[slow])],
        lambda rows: (fast - 9).square().sum() + (slow - 9).square().sum(), TOKENS, lambda: -float(fast + slow))
    assert float(fast) == pytest.approx(10 * float(slow), rel=1e-3)


def test_a_loss_that_is_not_finite_stops() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(NotFinite, match="learning rate"):
        fit(plan(), [Group(parameters=[weight])], lambda rows: (weight * math.nan).sum(), TOKENS, lambda: 0.0)
    with pytest.raises(NotFinite, match="held-out"):
        fit(plan(), [Group(parameters=[weight])], lambda rows: weight.sum(), TOKENS, lambda: math.inf)


def test_rate_warms_up_and_ends_near_zero() -> None:
    rates = [rate_at(step, plan(steps=100, warmup=0.1)) for step in range(100)]
    assert np.argmax(rates) == 9 and rates[0] < 0.11 and rates[-1] < 0.001
    assert rates[50] == pytest.approx(0.5, abs=0.02)


def test_every_window_comes_once_per_round() -> None:
    stream = batches(TOKENS, 5, seed=3)
    seen = np.concatenate([next(stream) for _ in range(16)])[:80, 0]
    for round_ in range(5):
        assert sorted(seen[16 * round_ : 16 * (round_ + 1)]) == sorted(TOKENS[:, 0])


def test_forward_kl_and_its_gradient() -> None:
    torch.manual_seed(0)
    student = torch.randn(3, 300, 7, requires_grad=True)
    teacher = torch.randn(3, 300, 7)
    ours = forward_kl(student, teacher)
    (mine,) = torch.autograd.grad(ours, student)
    reference = torch.nn.functional.kl_div(
        torch.log_softmax(student, -1).flatten(0, 1), torch.log_softmax(teacher, -1).flatten(0, 1), log_target=True,
        reduction="batchmean",
    )
    (theirs,) = torch.autograd.grad(reference, student)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(mine, theirs)
