"""Surroundings: the machine, the model, the examples and the limits that a way of fine-tuning is forecast for.

    seconds allowed = the least of: the time, energy / power at all cores busy, money / price of a busy second
    judging         = 2 models x tokens asked x 2 x parameters / (rate x REACHED), within those limits
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from fivefold.budget import TrainingBudget
from fivefold.machine import Machine
from fivefold.meters import money
from fivefold.meters.energy import PowerModel
from fivefold.meters.money import Prices
from fivefold.model import Model, TrainPlan
from fivefold.quantity import Quantity
from fivefold.study.judged import Exam
from fivefold.study.resident import Added
from fivefold.training.batching import Stream
from fivefold.training.data import Examples

REACHED = 0.45
"""Share of the machine's rate of large products that training reaches here, all work counted."""
UNITS = {"time": "s", "energy": "J", "money": "USD"}
SCORED = 512
"""Positions whose logits the torch engine makes at once."""


@dataclass(frozen=True)
class Surroundings:
    """What a forecast depends on besides the recipe.

    `process(libraries)` is what a process whose adaptation imports these holds besides its numbers. `dtype` is computed
    with; the files hold `stored` bytes per number, in the `same` type or another.
    """

    model: Model
    examples: Examples
    exam: Exam
    budget: TrainingBudget
    machine: Machine
    prices: Prices
    process: Callable[[tuple[str, ...]], Added]
    dtype: Literal["float32", "bfloat16"]
    stored: int = 4
    same: bool = False
    _rounds: dict[tuple[int, int, str], Stream] = field(default_factory=dict, compare=False)

    @property
    def element(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4

    def stream(self, plan: TrainPlan) -> Stream:
        """The steps of a plan; cutting many examples into steps takes a while and is done once."""
        asked = (plan.tokens_per_step, plan.seed, plan.layout)
        if asked not in self._rounds:
            self._rounds[asked] = Stream(self.examples.rows, plan.tokens_per_step, plan.at_once, plan.seed, plan.layout)
        return self._rounds[asked]

    def rate(self, dtype: str) -> float:
        """FLOP/s of large products, of float32 where the machine has no rate for the type."""
        found = self.machine.gemm(dtype).value or self.machine.gemm("float32").value
        assert found, "a calibrated machine knows its rate in float32"
        return found

    def spent(self, seconds: float) -> dict[str, float]:
        """s, J and USD of so many seconds with all cores busy."""
        joules = seconds * PowerModel.of(self.machine).active * self.machine.cores
        usd = money.cost(self.prices, self.machine, seconds=Quantity(value=seconds, unit="s", method="modelled"),
                         joules=Quantity(value=joules, unit="J", method="modelled"))
        return {"time": seconds, "energy": joules, "money": float(usd.value or 0.0)}

    def allowed(self) -> tuple[float, str]:
        """Seconds until a limit is reached, and which it is; (inf, "") without one."""
        limits = {name: getattr(self.budget, name) for name in UNITS}
        found = [(limits[name] / each, name) for name, each in self.spent(1.0).items()
                 if limits[name] is not None and each > 0]
        return min(found, default=(math.inf, ""))

    def judging_seconds(self) -> float:
        """Of parent and artifact, in the type they are served in."""
        return 2 * self.exam.tokens * 2.0 * self.model.blueprint.matrix_parameters / (
            REACHED * self.rate(self.model.run.dtype))

    def judging_bytes(self, held: float) -> float:
        """Of a process that holds `held` besides: the weights as they are served, and log-probabilities of a row."""
        b, rows = self.model.blueprint, self.exam.longest + 2 * min(self.exam.longest, SCORED)
        return held + (2.0 if self.model.run.dtype == "bfloat16" else 4.0) * b.parameters + 4.0 * b.vocab * rows


@dataclass(frozen=True)
class Steps:
    """What the steps of a round are like: how many, their `positions` on average and those `learned`, and the most
    `learned_at_once`."""

    number: int
    positions: float
    learned: float
    learned_at_once: int

    @classmethod
    def of(cls, stream: Stream, at_once: int) -> Steps:
        counts = [int(row.learn[1:].sum()) for row in stream.rows]
        steps = [[sum(counts[i] for i in row) for row in step] for step in stream.epoch(0)]
        width = max(1, at_once // stream.length)
        most = max(sum(step[i : i + width]) for step in steps for i in range(0, len(step), width))
        packed = stream.layout == "pack"
        positions = sum(map(len, steps)) * stream.length if packed else sum(len(row.tokens) for row in stream.rows)
        return cls(len(steps), positions / len(steps), sum(counts) / len(steps), most)
