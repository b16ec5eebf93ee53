"""Training in phases: each begins anew, and only the last one's states can be handed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fivefold.model import TrainPlan
from fivefold.training.adamw import AdamW
from fivefold.training.checkpoint import Keeper
from fivefold.training.loop import Group, Hooks, fit, rate_at

GOAL = torch.linspace(-1, 1, 6)


class Watched(AdamW):
    """Notes (number of states, step count, rate) of every update."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, float]] = []
        self.states: Any = None

    def begin(self, step: int, parameters: Any, states: Any) -> None:
        self.states = states

    def update(self, weight: Any, gradient: Any, state: Any, beside: Any, rate: float, step: int, dice: Any) -> None:
        self.seen.append((int((state["mean"] != 0).sum()), step, rate))
        super().update(weight, gradient, state, beside, rate, step, dice)


def run(
    steps: int = 10, phases: tuple[int, ...] = (4,), back: bool = True, *, dtype: torch.dtype = torch.float32,
    held: Any = "split",
    keeper: Keeper | None = None, stop: int = 0, scores: Any = None, patience: int = 0, seconds: float = 0.0,
) -> tuple[Any, torch.Tensor, Watched]:
    """w towards GOAL from 3; at each phase's begin w returns to 3 if `back`."""
    weight = torch.nn.Parameter(torch.full((6,), 3.0, dtype=dtype))
    optimizer = Watched()
    told = TrainPlan(steps=steps, learning_rate=0.2, seconds=seconds)

    def listen(step: Any) -> None:
        if step.step == stop:
            raise KeyboardInterrupt

    hooks = Hooks(phases=phases, anew=lambda value: ["w"] if back else [], listen=listen)
    done = fit(
        told, [Group(parameters={"w": weight})], lambda batch: (weight.float() - GOAL).square().sum(),
        lambda step: [(step, 1.0)], scores or (lambda: float((weight.detach().float() - GOAL).square().sum())),
        optimizer=optimizer, held=held, hooks=hooks, keeper=keeper, checks=10, patience=patience,
        exact=lambda name: torch.full((6,), 3.0),
    )
    return done, done.value("w").clone(), optimizer


@pytest.mark.parametrize(("dtype", "held"), [(torch.float32, "split"), (torch.bfloat16, "split"),
                                             (torch.bfloat16, "kahan")])
def test_a_phase_is_a_run_of_its_own(dtype: torch.dtype, held: str) -> None:
    _, ends, watched = run(dtype=dtype, held=held)
    _, alone, other = run(steps=6, phases=(), dtype=dtype, held=held)
    assert torch.equal(ends, alone), "the second phase, from the first value, is a run of 6 steps"
    assert watched.seen[4:] == other.seen
    assert [count for _, count, _ in watched.seen] == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6]
    assert watched.seen[4][0] == 0, "a fresh state"


def test_what_a_rounding_lost_does_not_survive_the_return() -> None:
    for at in range(1, 8):
        _, ends, _ = run(phases=(at,), dtype=torch.bfloat16, held="kahan")
        _, alone, _ = run(steps=10 - at, phases=(), dtype=torch.bfloat16, held="kahan")
        assert torch.equal(ends, alone), at


def test_without_going_back_only_optimiser_and_schedule_are_new() -> None:
    done, ends, watched = run(back=False)
    _, other, _ = run(back=True)
    assert not torch.equal(ends, other)
    assert watched.seen[4][0] == 0
    plan = TrainPlan(steps=10, learning_rate=0.2)
    expected = [0.2 * rate_at(k, plan, 4) for k in range(4)] + [0.2 * rate_at(k, plan, 6) for k in range(6)]
    assert [rate for _, _, rate in watched.seen] == pytest.approx(expected)
    assert done.losses[4] < done.losses[0]


def test_scores_of_earlier_phases_do_not_count() -> None:
    asked = iter([5.0, *[4.0, 3.5, 3.0, 3.2, 3.1, 3.6]])
    done, _, _ = run(scores=lambda: next(asked))
    assert done.history == ((0, 5.0), (5, 4.0), (6, 3.5), (7, 3.0), (8, 3.2), (9, 3.1), (10, 3.6))
    assert done.best_step == 7 and done.after == 3.0
    asked = iter([1.0, *[4.0] * 6])
    done, ends, _ = run(scores=lambda: next(asked))
    assert done.best_step == 0 and torch.equal(ends, torch.full((6,), 3.0)), "the start is better than the last phase"


def test_neither_patience_nor_time_ends_it_before_the_last_phase() -> None:
    done, _, _ = run(scores=lambda: 1.0, patience=1)
    assert done.steps == 5 and "no better" in done.stopped
    done, _, _ = run(seconds=1e-9)
    assert done.steps == 5 and "time" in done.stopped and done.history[-1][0] == 5


@pytest.mark.parametrize("stop", [2, 4, 5, 6, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_stopped_anywhere_repeats(tmp_path: Path, stop: int, dtype: torch.dtype) -> None:
    whole, ends, _ = run(dtype=dtype)
    with pytest.raises(KeyboardInterrupt):
        run(dtype=dtype, stop=stop, keeper=Keeper(tmp_path, "k", every=0.0))
    again, other, _ = run(dtype=dtype, keeper=Keeper(tmp_path, "k", every=0.0))
    assert torch.equal(ends, other) and again.losses == whole.losses and again.history == whole.history
