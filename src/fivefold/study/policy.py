"""Policy: what a study does next, as a pure function of its records.

Predict, screen, verify. A proposal that the cost model objects to is written down and costs nothing. The others are
built and screened. Of all trials screened so far the better half, by rank under constraint domination, is measured in
full: successive halving without waiting for a round to fill (Li et al. 2020, "ASHA"; with ranks in place of one score
as in Schmucker et al. 2021). The random numbers of a step depend on the seed and on how many trials there are, so a
study that was killed proposes what it would have proposed.

A step is begun only when it is expected to end within the allowance. A share of it (`turn_share`) is kept for the last
step, the picks measured in turn with the parent (`in_turn`). Where the trials say that even its shortest form costs
more than twice that share, nothing is kept, and the step is done only if enough happens to be left.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fivefold.budget import Allowance
from fivefold.quantity import Measurement
from fivefold.recipe import Recipe
from fivefold.study.in_turn import PHASE, Turn, turn, unpaired
from fivefold.study.pareto import Goal, point, ranks
from fivefold.study.picks import picks
from fivefold.study.predictor import Predictor
from fivefold.study.sampler import Sampler, SearchSpace
from fivefold.study.trial import Outcome, Trial, estimate

RESERVE = 1.25
ASKS = 6
UNANSWERED = 1 / 3
"""Share of what is left that one trial may take while nothing measured meets the budget: a first answer comes before a
dear one, whose forecast may be wrong."""
DEFAULT_TRIALS = 40
PREDICTED_IN_A_ROW = 200
SCREEN_SHARE = ("build", "screen", "overhead")
MEASURE_SHARE = ("measure", "quality", "overhead")


@dataclass(frozen=True, slots=True)
class Build:
    recipe: Recipe
    predicted: Measurement
    expected: float


@dataclass(frozen=True, slots=True)
class Drop:
    """The cost model objects; `sentence` says why."""

    recipe: Recipe
    predicted: Measurement
    sentence: str


@dataclass(frozen=True, slots=True)
class Measure:
    trial: Trial
    expected: float


@dataclass(frozen=True, slots=True)
class InTurn:
    """Measure the parent and these trials in turn."""

    parent: Trial
    trials: tuple[Trial, ...]
    turn: Turn
    patience: float


@dataclass(frozen=True, slots=True)
class Stop:
    """`apart` says why the picks were not measured in turn with the parent, or ""."""

    why: str
    apart: str = ""


Step = Build | Drop | Measure | InTurn | Stop


@dataclass(frozen=True)
class Policy:
    """`most` limits the trials that are built; None is no limit. `turn_share` 0 leaves out the last step."""

    goal: Goal
    space: SearchSpace
    sampler: Sampler
    predictor: Predictor
    allowance: Allowance
    seed: int = 0
    most: int | None = None
    turn_share: float = 0.0

    def next(self, trials: Sequence[Trial]) -> Step:
        step = self._search(trials)
        return self._last(step, trials) if isinstance(step, Stop) and self.turn_share else step

    def _search(self, trials: Sequence[Trial]) -> Step:
        forecast = self.predictor.after(trials)
        if not trials:
            recipe = Recipe()
            return Build(recipe, forecast.predict(recipe), sum(forecast.seconds(recipe).values()))
        if trials[0].outcome is Outcome.SCREENED:
            return Measure(trials[0], 0.0)
        left = self.left(trials)
        promising = promoted(trials, self.goal)
        if promising is not None:
            seconds = forecast.seconds(Recipe.parse(promising.recipe))
            expected = sum(seconds[phase] for phase in MEASURE_SHARE)
            if expected * RESERVE <= left:
                return Measure(promising, expected)
            return Stop(f"the next measurement would take about {expected:.0f} s and {max(left, 0):.0f} s are left")
        return self._propose(trials, left)

    def _propose(self, trials: Sequence[Trial], left: float) -> Step:
        built = sum(t.outcome is not Outcome.PREDICTED for t in trials)
        if self.most is not None and built >= self.most:
            return Stop(f"{built} trials were run, as many as asked for")
        if self._exceeded(trials):
            return Stop(f"the allowance of {self._exceeded(trials)} is spent")
        last = trials[-PREDICTED_IN_A_ROW:]
        if len(last) == PREDICTED_IN_A_ROW and all(t.outcome is Outcome.PREDICTED for t in last):
            return Stop("the cost model objects to every further proposal")
        forecast = self.predictor.after(trials)
        parent = estimate(trials[0])
        expected, share = math.inf, 1.0 if answered(trials, self.goal) else UNANSWERED
        for attempt in range(ASKS):
            rng = random.Random(f"{self.seed}:{len(trials)}:{attempt}")
            recipe = self.sampler.ask(trials, self.space, rng, share * left / RESERVE)
            if recipe is None:
                return Stop("every recipe of the space was tried")
            predicted = forecast.predict(recipe)
            objection = forecast.objection(recipe, predicted, self.goal, parent)
            if objection:
                return Drop(recipe, predicted, objection)
            seconds = forecast.seconds(recipe)
            expected = sum(seconds.values())
            if expected * RESERVE <= left:
                return Build(recipe, predicted, sum(seconds[phase] for phase in SCREEN_SHARE))
        return Stop(f"the next trial would take about {expected:.0f} s and {max(left, 0):.0f} s are left")

    def _last(self, stop: Stop, trials: Sequence[Trial]) -> Step:
        """Measure what is due in turn, or say why not."""
        due = unpaired(trials, self.goal)
        if not due:
            return stop
        if spent := self._exceeded(trials):
            return Stop(stop.why, f"the allowance of {spent} is spent")
        time = self.allowance.time
        left = math.inf if time is None else time - spent_seconds(trials)
        wanted = turn([trials[0], *due], math.inf if time is None else min(left, 2 * self.turn_share * time))
        if wanted.expected > left:
            return Stop(
                stop.why, f"measuring the picks in turn with the parent would take about {wanted.expected:.0f} s and"
                f" {max(left, 0):.0f} s are left",
            )
        return InTurn(trials[0], tuple(due), wanted, max(left, wanted.expected))

    def left(self, trials: Sequence[Trial]) -> float:
        """Seconds of the allowance that are left for the search."""
        if self.allowance.time is None:
            return math.inf
        done = sum(t.spent.get(PHASE, 0.0) for t in trials)
        chosen = [p.trial for p in picks(trials, self.goal)] if self.turn_share else []
        due = [t for t in chosen if not t.paired.context]
        last = max(self.kept(trials, chosen), done + self.kept(trials, due) if due else done)
        return self.allowance.time - (spent_seconds(trials) - done) - last

    def kept(self, trials: Sequence[Trial], due: Sequence[Trial] = ()) -> float:
        """Seconds kept for measuring `due` in turn, unknown ones if it is empty."""
        share = self.turn_share * (self.allowance.time or 0.0)
        cost = turn([trials[0], *due], 0.0).expected if share and due else 0.0
        return 0.0 if cost > 2 * share else max(share, cost)

    def _exceeded(self, trials: Sequence[Trial]) -> str:
        for name, key in (("energy", "energy.J"), ("money", "money.USD")):
            limit = getattr(self.allowance, name)
            spent = [t.spent[key] for t in trials if key in t.spent]
            if limit is not None and spent and sum(spent) + max(spent) > limit:
                return name
        return ""


def spent_seconds(trials: Sequence[Trial]) -> float:
    """Seconds by phase summed over trials; keys with a dot are details or other units."""
    return sum(s for t in trials for phase, s in t.spent.items() if "." not in phase)


def answered(trials: Sequence[Trial], goal: Goal) -> bool:
    """Whether something that was measured meets the budget."""
    parent = estimate(trials[0])
    return any(t.outcome is Outcome.MEASURED and goal.budget.met(estimate(t), parent) for t in trials)


def promoted(trials: Sequence[Trial], goal: Goal) -> Trial | None:
    """The first screened trial that belongs to the better half of all that were screened; None when there is none.

    Once a trial within the budget was measured, one whose screen says clearly that it is not is never promoted.
    """
    parent: Mapping[str, float | None] = estimate(trials[0])
    goal = goal.of_screen()
    known = [
        (p, t) for t in trials[1:] if t.outcome in (Outcome.SCREENED, Outcome.MEASURED)
        and (p := point(estimate(t), goal.objectives)) is not None
    ]
    excess = [goal.budget.excess(estimate(t), parent) for _, t in known]
    layers = ranks([p for p, _ in known], [min(e, 1e9) for e in excess])
    order = sorted(range(len(known)), key=lambda i: (layers[i], known[i][1].number))
    better = order[: math.ceil(len(order) / 2)]
    served = any(e <= 0 and t.outcome is Outcome.MEASURED for e, (_, t) in zip(excess, known, strict=True))
    return next((
        t for i in better if (t := known[i][1]).outcome is Outcome.SCREENED and not (served and misses(t, goal, parent))
    ), None)


def misses(trial: Trial, goal: Goal, parent: Mapping[str, float | None]) -> bool:
    """Whether the whole interval of something screened lies outside its limit."""
    for limit in goal.budget:
        seen = trial.screen.get(limit.metric)
        end = None if seen is None else seen.low if limit.upper else seen.high
        if end is not None and (limit.excess({limit.metric: end}, parent) or 0.0) > 0:
            return True
    return False
