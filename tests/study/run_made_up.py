"""A study of the made-up table in a process of its own: `python run_made_up.py MODEL OUT SAMPLER SECONDS_PER_PHASE`."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from made_up import formula, machine, made_up_table

from fivefold.budget import Allowance, Budget
from fivefold.model import load
from fivefold.quantity import Measurement, Quantity
from fivefold.recipe import Recipe
from fivefold.study.driver import Phase, Report
from fivefold.study.in_turn import Turn
from fivefold.study.pareto import Goal
from fivefold.study.policy import Policy
from fivefold.study.predictor import Predictor
from fivefold.study.sampler import make
from fivefold.study.study import Study
from fivefold.study.trial import Trial
from fivefold.testing import ReplayMeter

GOAL = Goal(("latency", "size", "kl"), Budget.parse("size<=0.9x"))


class Slow(ReplayMeter):
    """A replay that takes a little while in each phase, so that it can be killed there."""

    pause = 0.0

    def build(self, recipe: Recipe, number: int, phase: Phase) -> Report:
        time.sleep(random.random() * self.pause)
        return super().build(recipe, number, phase)

    def measure(self, recipe: Recipe, number: int, artifact: str | None, phase: Phase) -> Report:
        time.sleep(random.random() * self.pause)
        return super().measure(recipe, number, artifact, phase)

    def in_turn(
        self, parent: Trial, trials: Sequence[Trial], turn: Turn, patience: float, phase: Phase
    ) -> tuple[Mapping[int, Measurement], Mapping[str, float]]:
        time.sleep(random.random() * self.pause)
        return {t.number: paired(t) for t in trials}, {}


def paired(trial: Trial) -> Measurement:
    """The ratio to the parent by the formula."""
    ratio = formula(trial.recipe)["latency"] / formula("parent")["latency"]
    context = {"outcome": "measured", "sentence": "", "rounds": 6, "requests": 1}
    return Measurement({"latency": Quantity(value=ratio, unit="x", method="measured", n=6)}, context)


def policy(
    model: Path, sampler: str, most: int = 14, seconds: float | None = None, share: float = 0.08
) -> Policy:
    predictor = Predictor(machine(), load(model))
    space = made_up_table_space()
    return Policy(GOAL, space, make(sampler, GOAL, predictor), predictor, Allowance(time=seconds), 0, most, share)


def made_up_table_space():  # type: ignore[no-untyped-def]
    from fivefold.testing import Table

    return Table.of(made_up_table()).space()


def runner(pause: float = 0.0) -> Slow:
    from fivefold.testing import Table

    slow = Slow(Table.of(made_up_table()))
    slow.pause = pause
    return slow


if __name__ == "__main__":
    model, out, sampler, pause = sys.argv[1:5]
    Study(out).run(policy(Path(model), sampler), runner(float(pause)), {"sampler": sampler})
    print("finished")
