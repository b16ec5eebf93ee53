"""The training loop: AdamW, warm-up and cosine, gradient accumulation, and the best state on held-out text is kept.

    rate(step) = base * min(1, (step + 1) / warm-up steps) * (1 + cos(pi * step / steps)) / 2

A step is `tokens_per_step` tokens in sequences of `sequence`, a few sequences at a time; gradients are averaged over
all of them and clipped to norm 1 over all parameters. The held-out score is taken before the first step, at a few
points and after the last; the parameters end as they were at its lowest, so fitting cannot leave the model worse on
that text than it was. A loss or score that is not finite raises NotFinite: nothing half-trained is handed on.

Source: AdamW (Loshchilov & Hutter, arXiv 1711.05101).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fivefold.errors import NotFinite
from fivefold.model import TrainPlan

if TYPE_CHECKING:
    import torch

Tokens = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share a learning rate, `rate` times the plan's."""

    parameters: Sequence[torch.nn.Parameter]
    rate: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Held-out score before and at the best point, that point's step, and all that was done."""

    before: float
    after: float
    best_step: int
    steps: int
    tokens: int
    seconds: float
    history: tuple[tuple[int, float], ...]


def batches(tokens: Tokens, rows: int, seed: int) -> Iterator[Tokens]:
    """Endless batches of `rows` of the given windows (windows, length): each window once per round, shuffled."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(tokens))
    at = 0
    while True:
        while len(order) - at < rows:
            order, at = np.concatenate([order[at:], random.permutation(len(tokens))]), 0
        yield tokens[order[at : at + rows]]
        at += rows


def rate_at(step: int, plan: TrainPlan) -> float:
    """The share of the base learning rate at 0-based `step`."""
    warm = max(1, round(plan.warmup * plan.steps))
    return min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * step / plan.steps)) / 2


def fit(
    plan: TrainPlan,
    groups: Iterable[Group],
    loss: Callable[[Tokens], torch.Tensor],
    tokens: Tokens,
    score: Callable[[], float],
    *,
    checks: int = 4,
    at_once: int = 4,
) -> Fitted:
    """Minimise `loss(rows of tokens)` (a mean over tokens) and end at the lowest `score()`.

    `score` is asked before the first step and `checks` times more; `at_once` sequences pass the model together.
    """
    import torch

    groups = [group for group in groups if group.parameters]
    parameters = [p for group in groups for p in group.parameters]
    optimizer = torch.optim.AdamW(
        [{"params": list(group.parameters), "share": group.rate} for group in groups], weight_decay=0.0,
        betas=(0.9, 0.98),
    )
    best, history = _Best(parameters), [(0, score())]
    best.offer(0, history[0][1])
    rows = max(1, plan.tokens_per_step // tokens.shape[1])
    started = time.monotonic()
    stream = batches(tokens, rows, plan.seed)
    due = {math.ceil(plan.steps * (k + 1) / checks) for k in range(checks)}
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * group["share"] * rate_at(step, plan)
        _accumulate(loss, next(stream), at_once)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step + 1 in due:
            history.append((step + 1, score()))
            best.offer(*history[-1])
    best.restore()
    return Fitted(
        before=history[0][1], after=best.score, best_step=best.step, steps=plan.steps, history=tuple(history),
        tokens=plan.steps * rows * tokens.shape[1], seconds=time.monotonic() - started,
    )


def _accumulate(loss: Callable[[Tokens], torch.Tensor], batch: Tokens, at_once: int) -> None:
    for first in range(0, len(batch), at_once):
        part = batch[first : first + at_once]
        value = loss(part)
        reached = float(value.detach())
        if not math.isfinite(reached):
            raise NotFinite(f"the training loss became {reached}; lower the learning rate")
        (value * (len(part) / len(batch))).backward()


class _Best:
    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters, self.score, self.step = parameters, math.inf, 0
        self.kept: list[torch.Tensor] = []

    def offer(self, step: int, score: float) -> None:
        if not math.isfinite(score):
            raise NotFinite(f"the held-out score became {score} at step {step}; lower the learning rate")
        if score < self.score:
            self.score, self.step = score, step
            self.kept = [p.detach().clone() for p in self.parameters]

    def restore(self) -> None:
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            parameter.data.copy_(kept)
