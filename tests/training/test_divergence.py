"""Every divergence is its formula, in value and gradient, and does what it is known for on a mixture of two modes."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch

from fivefold.training.cross_entropy import CHUNK, TOGETHER
from fivefold.training.divergence import Divergence, Kind, head_divergence, logits_divergence

WIDTH, VOCAB = 6, 41
KINDS = get_args(Kind)


def dense(told: Divergence, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over rows, by the textbook formulas on probabilities in float64."""
    t = told.temperature
    p, q = torch.softmax(teacher.double() / t, -1), torch.softmax(student.double() / t, -1)
    m = told.mix * p + (1 - told.mix) * q

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum(-1)

    each = {"forward_kl": lambda: kl(p, q), "reverse_kl": lambda: kl(q, p), "skew_kl": lambda: kl(p, m),
            "jsd": lambda: told.mix * kl(p, m) + (1 - told.mix) * kl(q, m)}[told.kind]()
    return t**2 * each.mean()


def problem(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student's hidden states, its head, the teacher's logits)"""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, WIDTH, generator=draw, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, generator=draw, requires_grad=True)
    return hidden, weight, 3 * torch.randn(count, VOCAB, generator=draw)


def chunked(told: Divergence, hidden: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor) -> list[torch.Tensor]:
    loss = head_divergence(told, hidden, weight, lambda rows: teacher[rows].clone())
    return [loss, *torch.autograd.grad(1.7 * loss, [hidden, weight])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("mix", [0.1, 0.5, 0.9])
def test_value_and_gradients_are_those_of_the_formula(kind: Kind, temperature: float, mix: float) -> None:
    told = Divergence(kind=kind, temperature=temperature, mix=mix)
    hidden, weight, teacher = problem(50)
    loss = dense(told, hidden @ weight.T, teacher)
    wanted = [loss, *torch.autograd.grad(1.7 * loss, [hidden, weight])]
    for mine, theirs in zip(chunked(told, hidden, weight, teacher), wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK + 1, TOGETHER, TOGETHER + CHUNK + 1])
def test_at_the_borders_of_chunks(kind: Kind, count: int) -> None:
    told = Divergence(kind=kind, temperature=1.5, mix=0.3)
    hidden, weight, teacher = problem(count)
    loss = dense(told, hidden @ weight.T, teacher)
    wanted = [loss, *torch.autograd.grad(1.7 * loss, [hidden, weight])]
    logits = (hidden @ weight.T).detach().requires_grad_()
    straight = logits_divergence(told, logits, lambda rows: teacher[rows].clone())
    (of_logits,) = torch.autograd.grad(1.7 * straight, logits)
    through = [straight, of_logits @ weight, of_logits.T @ hidden]
    for mine, theirs, exact in zip(chunked(told, hidden, weight, teacher), through, wanted, strict=True):
        torch.testing.assert_close(mine.double(), exact.double(), rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(theirs.double(), exact.double(), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind: Kind) -> None:
    hidden, weight, _ = problem(200)
    loss, of_hidden, of_weight = chunked(Divergence(kind=kind), hidden, weight, (hidden @ weight.T).detach())
    assert abs(float(loss.detach())) < 1e-6
    assert float(of_hidden.abs().max()) < 1e-7 and float(of_weight.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind: Kind) -> None:
    """The teacher is certain of one word and the student of another: probabilities underflow."""
    student, teacher = torch.zeros(1, 5), torch.zeros(1, 5)
    student[0, 1], teacher[0, 2] = 400.0, 400.0
    gradient = torch.empty(1, 5)
    value = Divergence(kind=kind, mix=0.1).of(student, teacher, gradient)
    assert math.isfinite(float(value)) and bool(gradient.isfinite().all())
    bounded = {"skew_kl": math.log(10), "jsd": 0.1 * math.log(10) + 0.9 * math.log(1 / 0.9)}
    assert float(value) == pytest.approx(bounded.get(kind, 400.0), rel=1e-5)


def test_jsd_lies_between_the_two_kls() -> None:
    teacher, student = torch.randn(2, 30, VOCAB, generator=torch.Generator().manual_seed(0)).unbind()
    for mix, kind in ((1e-4, "forward_kl"), (1 - 1e-4, "reverse_kl")):
        near = dense(Divergence(kind="jsd", mix=mix), student, teacher) / min(mix, 1 - mix)
        ours = Divergence(kind="jsd", mix=mix).of(student.clone(), teacher.clone()).double().mean() / min(mix, 1 - mix)
        wanted = Divergence(kind=kind).of(student.clone(), teacher.clone()).double().mean()  # type: ignore[arg-type]
        assert float(near) == pytest.approx(float(wanted), rel=5e-3)
        assert float(ours) == pytest.approx(float(wanted), rel=2e-2)


@pytest.mark.parametrize("told", [{"temperature": 0.0}, {"kind": "jsd", "mix": 0.0}, {"kind": "skew_kl", "mix": 1.0}])
def test_impossible_settings_are_refused(told: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs"):
        Divergence(**told)


X = np.linspace(-8, 8, 321)


def bell(mean: float, deviation: float) -> np.ndarray:
    found = np.exp(-0.5 * ((X - mean) / deviation) ** 2)
    return np.asarray(found / found.sum())


MODES = 0.6 * bell(-3, 0.7) + 0.4 * bell(3, 0.7)


def fitted(kind: Kind, start: tuple[float, float]) -> tuple[float, float]:
    """(mean, deviation) of the single bell that lies nearest to the two modes, found with the chunked gradients.

    A bell is an exponential family: its logits are a x + b x^2, hidden states (a, b) times a fixed head.
    """
    mean, deviation = start
    head = torch.tensor(np.stack([X, X**2 / 8], 1), dtype=torch.float32)
    hidden = torch.tensor([[mean / deviation**2, -4 / deviation**2]], requires_grad=True)
    teacher = torch.tensor(np.log(MODES + 1e-30), dtype=torch.float32)[None]
    learn = torch.optim.LBFGS([hidden], lr=0.5, max_iter=400, line_search_fn="strong_wolfe", tolerance_grad=1e-8)

    def loss() -> torch.Tensor:
        learn.zero_grad()
        value = head_divergence(Divergence(kind=kind), hidden, head, lambda rows: teacher[rows].clone())
        value.backward()
        return value

    for _ in range(5):
        learn.step(loss)
    q = torch.softmax(hidden.detach().double() @ head.double().T, -1)[0].numpy()
    centre = float((q * X).sum())
    return centre, float(np.sqrt((q * (X - centre) ** 2).sum()))


def test_forward_kl_covers_both_modes() -> None:
    """In closed form: the mixture's own mean and variance, with mass in the valley where the mixture has none."""
    mean = float((MODES * X).sum())
    deviation = float(np.sqrt((MODES * (X - mean) ** 2).sum()))
    assert mean == pytest.approx(-0.6, abs=0.01) and deviation > 2.9
    found = fitted("forward_kl", (1.0, 1.5))
    assert found == pytest.approx((mean, deviation), rel=0.02)
    valley = np.abs(X) < 1
    assert bell(*found)[valley].sum() > 0.15 > 0.01 > MODES[valley].sum()


@pytest.mark.parametrize("start", [(-2.0, 1.0), (2.0, 1.0)])
def test_reverse_kl_seeks_one_mode(start: tuple[float, float]) -> None:
    """Beside the best of a fine grid around the start: one mode, with its own width."""
    def apart(mean: float, deviation: float) -> float:
        q = bell(mean, deviation)
        return float((q * np.log((q + 1e-300) / (MODES + 1e-30))).sum())

    around = [(start[0] + 0.05 * i, 0.5 + 0.02 * k) for i in range(-30, 31) for k in range(40)]
    best = min(around, key=lambda pair: apart(*pair))
    found = fitted("reverse_kl", start)
    assert found == pytest.approx(best, abs=0.05)
    assert abs(found[0]) == pytest.approx(3, abs=0.05) and found[1] == pytest.approx(0.7, abs=0.05)
    assert bell(*found)[np.abs(X) < 1].sum() < 0.01
