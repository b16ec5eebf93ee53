"""Watching a training run: each step is logged and told, the memory held against the budget, the rest ends the run.

Memory that is exceeded stops the run with a sentence, because a forecast is not a promise. Time, energy and money that
are used up end it early, with the best state so far.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from fivefold.budget import TrainingBudget
from fivefold.errors import OutOfMemory
from fivefold.files import storage
from fivefold.meters.ledger import Cost, metered
from fivefold.metrics import show
from fivefold.study.forecast import Forecast
from fivefold.study.surroundings import UNITS


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step: its loss, tokens/s since this process goes on, and what the whole run took so far (J and USD may be
    None); `left` seconds are expected."""

    step: int
    steps: int
    loss: float
    score: float | None
    tokens_per_second: float
    left: float
    seconds: float
    joules: float | None
    usd: float | None
    memory: int


@dataclass(eq=False)
class Watch:
    """Hears each step of the loop. `before` is what earlier processes took, `tokens` those of a step on average, and
    `begun` the steps and the loop's seconds this process begins with. `reserve` is kept for judging, and `first` names
    the limit that was forecast to be reached first."""

    log: Path
    budget: TrainingBudget
    chosen: Forecast
    window: metered
    before: Cost | None
    tokens: float
    begun: tuple[int, float]
    reserve: dict[str, float]
    first: str
    listen: Callable[[Progress], None]

    def __enter__(self) -> Self:
        self._open = ExitStack()
        with storage(self.log):
            self._file = self._open.enter_context(self.log.open("a", encoding="utf-8"))
        self._since: tuple[int, float] | None = None
        self._last = 0.0
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()

    @property
    def heard(self) -> bool:
        """Whether a step was completed."""
        return self._since is not None

    @property
    def forecast(self) -> float | None:
        return self.chosen.needs.peak if self.chosen.needs else None

    def so_far(self) -> Cost:
        return self.window.so_far() if self.before is None else self.before + self.window.so_far()

    def __call__(self, step: Any) -> None:
        now, here = (step.step, step.seconds), self.window.so_far()
        cost = here if self.before is None else self.before + here
        since = self._since or self.begun
        each = (now[1] - since[1]) / (now[0] - since[0])
        self._since, self._last = self._since or now, step.seconds
        told = Progress(
            step=step.step, steps=step.steps, loss=step.loss, score=step.score, left=each * (step.steps - step.step),
            tokens_per_second=self.tokens / each if each > 0 else 0.0, seconds=cost.seconds.value or 0.0,
            joules=cost.energy.value, usd=cost.money.value, memory=int(cost.memory.value or 0),
        )
        with storage(self.log):
            self._file.write(json.dumps(asdict(told)) + "\n")
            self._file.flush()
        self.listen(told)
        limit, peak = self.budget.memory, here.memory.value
        if limit is not None and peak is not None and peak > limit:
            raise OutOfMemory(
                f"training with {self.chosen.recipe} took {show(peak, 'byte')} of memory, {show(limit, 'byte')} are"
                f" allowed and {show(self.forecast, 'byte')} were forecast; allow more and repeat the command, or"
                " choose a smaller way with --recipe and another --out"
            )

    def enough(self) -> str:
        """Which limit is used up, as a sentence; "" when none is."""
        cost = self.so_far()
        for name, taken in {"time": cost.seconds, "energy": cost.energy, "money": cost.money}.items():
            limit = getattr(self.budget, name)
            if limit is not None and (taken.value or 0.0) + self.reserve[name] >= limit:
                return f"the {name} of {show(limit, UNITS[name])} is used up"
        if 0 < self.chosen.plan.seconds < self._last:
            limit = getattr(self.budget, self.first)
            return f"the {self.first} of {show(limit, UNITS[self.first])} is used up, all cores taken as busy"
        return ""
