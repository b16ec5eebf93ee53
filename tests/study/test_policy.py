"""What a study does next: how much one trial may take before and after something meets the budget."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from made_up import machine, trial

from fivefold.budget import Allowance, Budget
from fivefold.model import Model
from fivefold.recipe import Recipe
from fivefold.study.pareto import Goal
from fivefold.study.policy import RESERVE, UNANSWERED, Policy
from fivefold.study.predictor import Predictor
from fivefold.study.sampler import SearchSpace
from fivefold.study.trial import Trial

GOAL = Goal(("latency",), Budget.parse("agreement>=0.85, memory<=100MB"))


class Asked:
    """Proposes one recipe and remembers how many seconds it was told it may take."""

    seconds = math.nan

    def ask(
        self, history: Sequence[Trial], space: SearchSpace, rng: random.Random, seconds: float = math.inf
    ) -> Recipe:
        self.seconds = seconds
        return Recipe.parse("threads(count=1)")


@pytest.mark.parametrize(("agreement", "share"), [(0.8, UNANSWERED), (0.9, 1.0)])
def test_until_something_meets_the_budget_one_trial_may_take_a_third_of_the_rest(
    bare: Model, agreement: float, share: float
) -> None:
    trials = [
        trial(0, "parent", latency=0.25, request=2.0, agreement=1.0, memory=500e6),
        trial(1, 'gguf(type="q4_0")', latency=0.1, request=1.0, agreement=agreement, memory=90e6),
    ]
    asked = Asked()
    policy = Policy(GOAL, SearchSpace({}, {}, bare), asked, Predictor(machine(), bare), Allowance(time=1000.0))
    policy.next(trials)
    assert asked.seconds == pytest.approx(share * policy.left(trials) / RESERVE)
