"""The loop against closed forms and against the same training written out with torch.optim."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small import Net, plan

from fivefold.errors import NotFinite
from fivefold.model import TrainPlan
from fivefold.testing.contract import sentence
from fivefold.training.adamw import AdamW
from fivefold.training.loop import Group, Hooks, Step, fit, rate_at, windows
from fivefold.training.optimizer import Optimizer


def by_torch(net: Net, told: TrainPlan, clip: float = 1.0) -> list[float]:
    """The same training with torch's own optimiser, clipping and schedule; its losses."""
    optimizer = torch.optim.AdamW(net.parameters(), told.learning_rate, (0.9, 0.98), 1e-8, weight_decay=0.0)
    warm = max(1, round(told.warmup * told.steps))
    shares = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / warm) * 0.5 * (1 + math.cos(math.pi * k / told.steps)))
    stream, losses = windows(np.arange(64), 16, told.seed, 16), []
    for number in range(told.steps):
        loss = net.loss(stream(number)[0][0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        shares.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("scale", [0.01, 0.2, 100.0])
def test_it_is_adamw_with_clipping_and_the_schedule(scale: float) -> None:
    ours, theirs = Net(scale), Net(scale)
    steps: list[Step] = []
    done = ours.fit(plan(), score=lambda: -len(steps), hooks=Hooks(listen=steps.append))
    losses = by_torch(theirs, plan())
    assert done.losses == pytest.approx(losses, rel=1e-4)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert {step.norm > 1 for step in steps} == {0.01: {False}, 0.2: {False, True}, 100.0: {True}}[scale]
    assert [(s.step, s.steps, s.loss) for s in steps] == [(k + 1, 12, loss) for k, loss in enumerate(done.losses)]
    assert [s.rate for s in steps] == pytest.approx([0.05 * rate_at(k, plan()) for k in range(12)])
    assert done.state_bytes == 2 * 4 * (30 + 6) and done.steps == 12


@pytest.mark.parametrize("at_once", [1, 5, 16])
def test_accumulation_is_one_large_batch(at_once: int) -> None:
    one, other = Net(), Net()
    losses = one.fit(plan(), at_once).losses
    assert losses == pytest.approx(other.fit(plan()).losses, rel=1e-5)
    torch.testing.assert_close(one.first, other.first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_is_whole_while_nothing_is_clipped(dtype: torch.dtype) -> None:
    one, other = Net(0.01, dtype), Net(0.01, dtype)
    steps: list[Step] = []
    fused = one.fit(plan(), fused=True, held="split", hooks=Hooks(listen=steps.append))
    whole = other.fit(plan(), held="split")
    assert fused.losses == whole.losses and max(step.norm for step in steps) < 1
    for name, p in one.named_parameters():
        assert torch.equal(fused.value(name), whole.value(name)) and p.grad is None
    one.loss([0]).backward()
    assert one.first.grad is not None, "a later backward pass is no training"


class Given(Optimizer):
    """Notes the norm of each gradient it is given, before the weight moves by a little."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def update(self, weight: Any, gradient: Any, state: Any, beside: Any, rate: float, step: int, dice: Any) -> None:
        self.norms.append(float(gradient.norm()))
        weight.sub_(1e-3 * gradient)


def test_fused_clips_by_the_step_before() -> None:
    net, seen, norms = Net(100.0), Given(), []
    net.fit(plan(steps=4), fused=True, optimizer=seen, score=lambda: -len(norms),
            hooks=Hooks(listen=lambda s: norms.append(s.norm)))
    again, raw = Net(100.0), []
    stream = windows(np.arange(64), 16, 0, 16)
    before = None
    for number in range(4):
        loss = again.loss(stream(number)[0][0])
        loss.backward()
        own = [float(p.grad.norm()) for p in again.parameters()]
        raw.append(math.hypot(*own))
        divisor = raw[-1] if before is None else before
        for p, norm in zip(again.parameters(), own, strict=True):
            p.data -= 1e-3 * p.grad / max(1.0, divisor, norm)
            p.grad = None
        before = raw[-1]
    assert norms == pytest.approx(raw, rel=1e-4) and min(raw) > 1
    assert max(seen.norms) <= 1 + 1e-5
    torch.testing.assert_close(net.first, again.first)


def test_fused_needs_the_step_in_one_batch() -> None:
    with pytest.raises(AssertionError, match="one batch"):
        Net().fit(plan(), at_once=4, fused=True)


def test_groups_learn_at_their_own_rate() -> None:
    fast, slow = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    fit(plan(steps=3, learning_rate=1e-3),
        [Group(parameters={"fast": fast}, rate=10), Group(parameters={"slow": slow})],
        lambda rows: 0.01 * ((fast - 9).square() + (slow - 9).square()).sum(), lambda step: [(0, 1.0)],
        lambda: -float((fast + slow).detach()))
    assert fast.item() == pytest.approx(10 * slow.item(), rel=1e-3) and slow.item() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_state_is_restored(dtype: torch.dtype) -> None:
    net, seen, done_steps = Net(dtype=dtype), [], []
    scores = iter([5.0, 4.0, 2.0, 3.0, 2.0])

    def score() -> float:
        seen.append({n: p.detach().clone() for n, p in net.named_parameters()})
        return next(scores)

    done = net.fit(plan(), score=score, held="split", hooks=Hooks(stepped=done_steps.append))
    assert done.history == ((0, 5.0), (3, 4.0), (6, 2.0), (9, 3.0), (12, 2.0))
    assert (done.before, done.after, done.best_step) == (5.0, 2.0, 6) and done_steps == list(range(1, 13))
    for name, p in net.named_parameters():
        assert torch.equal(p, seen[2][name]) and not torch.equal(p, seen[4][name])
        assert torch.equal(done.value(name).to(dtype), p)


def test_what_a_technique_keeps_returns_with_the_best_state() -> None:
    extra = torch.zeros(3)
    scores = iter([5.0, 1.0, 2.0, 3.0, 4.0])
    Net().fit(plan(), score=lambda: next(scores),
              hooks=Hooks(stepped=lambda step: extra.copy_(torch.full((3,), step)), buffers=lambda: {"extra": extra}))
    assert extra.tolist() == [3.0] * 3


def test_harm_is_undone() -> None:
    net = Net()
    before = net.first.detach().clone()
    done = net.fit(plan(), score=lambda: -net.score())
    assert done.best_step == 0 and done.after == done.before and torch.equal(net.first, before)


def test_patience() -> None:
    scores = [5.0, 4.0, 4.0, 4.5, 3.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0]
    for patience, steps, best in ((1, 2, 1), (2, 3, 1), (3, 7, 4), (9, 10, 4)):
        asked = iter(scores)
        done = Net().fit(plan(steps=10), score=lambda asked=asked: next(asked), checks=10, patience=patience)
        assert (done.steps, done.best_step) == (steps, best)
        assert bool(done.stopped) is (steps < 10) and (not done.stopped or str(patience) in done.stopped)


def test_the_time_ends_a_run_with_a_last_judgement() -> None:
    net = Net()
    start = time.monotonic()
    done = net.fit(plan(steps=500, seconds=0.3), hooks=Hooks(listen=lambda s: time.sleep(0.01)))
    assert 0.3 < time.monotonic() - start < 3 and 1 < done.steps < 100 and "time" in done.stopped
    assert done.history[-1][0] == done.steps and done.after == pytest.approx(net.score())
    assert Net().fit(plan(seconds=1000.0)).stopped == ""


def broken(what: str, net: Net) -> Callable[[Any], torch.Tensor]:
    def loss(rows: Any) -> torch.Tensor:
        value = net.loss(rows)
        if len(losses) == 3:
            if what == "loss":
                return value * math.nan
            return value + torch.where(net.first > 1e9, 1.0, 0.0 * net.first).sum().sqrt()
        losses.append(1)
        return value

    losses: list[int] = []
    return loss


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("fused", [False, True])
def test_what_is_not_finite_stops_before_it_is_saved(what: str, fused: bool) -> None:
    net, heard = Net(0.01), []
    with pytest.raises(NotFinite) as caught:
        fit(plan(), [Group(parameters=dict(net.named_parameters()))], broken(what, net), lambda step: [(range(8), 1.0)],
            net.score, fused=fused, hooks=Hooks(listen=lambda s: heard.append(s.step)))
    assert f"{what} became" in sentence(caught.value) and "lower the learning rate" in str(caught.value)
    assert heard == ([1, 2, 3] if not fused else [1, 2])
    if not fused:
        assert torch.isfinite(net.first).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_stops(value: float) -> None:
    with pytest.raises(NotFinite, match="held-out score became"):
        Net().fit(plan(), score=lambda: value)


def test_a_penalty_counts_once_a_step() -> None:
    one, other = Net(), Net()
    one.fit(plan(steps=6), at_once=4, hooks=Hooks(penalty=lambda step: 0.1 * step * one.first.square().sum()))
    losses: list[int] = []

    def loss(rows: Any) -> torch.Tensor:
        losses.append(1)
        return Net.loss(other, rows) + 0.1 * len(losses) * other.first.square().sum()

    fit(plan(steps=6), [Group(parameters=dict(other.named_parameters()))], loss, windows(np.arange(64), 16, 0, 16),
        other.score)
    torch.testing.assert_close(one.first, other.first)


def test_gradients_may_be_changed_before_the_update() -> None:
    net = Net()
    before = net.first.detach().clone()

    def mask(step: int) -> None:
        net.first.grad[:3] = 0

    net.fit(plan(), hooks=Hooks(gradients=mask))
    assert torch.equal(net.first[:3], before[:3]) and not torch.equal(net.first[3:], before[3:])


def test_a_listener_hears_scores_where_they_were_taken() -> None:
    heard: list[Step] = []
    done = Net().fit(plan(), hooks=Hooks(listen=heard.append), optimizer=AdamW(dtype=torch.bfloat16))
    assert {s.step: s.score for s in heard if s.score is not None} == dict(done.history[1:])
    assert [s.seconds for s in heard] == sorted(s.seconds for s in heard) and done.state_bytes == 2 * 2 * 36
