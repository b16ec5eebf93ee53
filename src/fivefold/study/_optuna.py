"""Optuna's multi-objective samplers behind our seam: TPE and NSGA-II, with the budget as constraints.

The Optuna study is rebuilt from the trials at each ask, so nothing is kept beside them. Each exclusive group is one
categorical parameter (a technique, or none), each searched field another, asked for only when its technique is in.
Objectives are given in coordinates (`pareto`); what was not measured in full enters with its screen and prediction, and
a trial without any value as failed. A proposal that does not fit or was tried already is drawn again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from fivefold.recipe import Recipe
from fivefold.study.pareto import Goal, point
from fivefold.study.sampler import SearchSpace, parts_of, seen
from fivefold.study.trial import Trial, estimate

STARTUP, POPULATION, ATTEMPTS = 10, 10, 60
NONE = "none"


class Optuna:
    def __init__(self, algorithm: str, goal: Goal) -> None:
        self.algorithm, self.goal = algorithm, goal

    def ask(
        self, history: Sequence[Trial], space: SearchSpace, rng: random.Random, seconds: float = math.inf
    ) -> Recipe | None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        tried, groups = seen(history), space.groups
        study = optuna.create_study(
            directions=["minimize"] * len(self.goal.objectives), sampler=self._sampler(rng.randrange(2**31))
        )
        parent = estimate(history[0]) if history else {}
        study.add_trials([self._told(trial, i, space, groups, parent) for i, trial in enumerate(history)])
        for _ in range(ATTEMPTS):
            trial = study.ask()
            recipe = space.recipe(self._suggest(trial, space, groups))
            if recipe is not None and len(recipe) and str(recipe) not in tried:
                return recipe
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return space.draw(rng, tried)

    def _sampler(self, seed: int) -> Any:
        import warnings

        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.algorithm == "tpe":
                return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, constant_liar=False)
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION)

    def _suggest(self, trial: Any, space: SearchSpace, groups: Sequence[tuple[str, ...]]) -> dict[str, dict[str, Any]]:
        parts: dict[str, dict[str, Any]] = {}
        for i, group in enumerate(groups):
            name = trial.suggest_categorical(f"group{i}", [NONE, *group])
            if name != NONE:
                parts[name] = {
                    key: values[trial.suggest_categorical(f"{name}.{key}", list(range(len(values))))]
                    for key, values in space.levels[name].items()
                }
        return parts

    def _told(
        self, trial: Trial, index: int, space: SearchSpace, groups: Sequence[tuple[str, ...]],
        parent: Mapping[str, float | None],
    ) -> Any:
        import optuna

        params, kinds = self._encoded(Recipe.parse(trial.recipe), space, groups)
        known = estimate(trial)
        where = None if trial.outcome.failed else point(known, self.goal.objectives)
        if where is None:
            return optuna.trial.create_trial(
                state=optuna.trial.TrialState.FAIL, params=params, distributions=kinds
            )
        gaps = {}
        for limit in self.goal.budget:
            gap = limit.excess(known, parent)
            gaps[str(limit)] = 1.0 if gap is None or not math.isfinite(gap) else gap
        generation = {"NSGAIISampler:generation": index // POPULATION}
        return optuna.trial.create_trial(
            values=list(where), params=params, distributions=kinds, constraints=gaps, system_attrs=generation
        )

    def _encoded(
        self, recipe: Recipe, space: SearchSpace, groups: Sequence[tuple[str, ...]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        from optuna.distributions import CategoricalDistribution

        parts = parts_of(recipe, space)
        params: dict[str, Any] = {}
        kinds: dict[str, Any] = {}
        for i, group in enumerate(groups):
            params[f"group{i}"] = next((name for name in group if name in parts), NONE)
            kinds[f"group{i}"] = CategoricalDistribution([NONE, *group])
        for name, fields in parts.items():
            for key, value in fields.items():
                values = space.levels[name][key]
                if value in values:
                    params[f"{name}.{key}"] = values.index(value)
                    kinds[f"{name}.{key}"] = CategoricalDistribution(list(range(len(values))))
        return params, kinds
