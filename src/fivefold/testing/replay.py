"""Replay: a study run against recorded trials instead of a machine, so that searches can be compared and tested.

A `Table` holds one finished trial per recipe. `ReplayMeter` is a study's runner that answers from it: the screen, the
measurement, the failure and the seconds each recipe was recorded with. What is not in the table does not exist, so the
table's `space` offers its recipes only. Comparing samplers this way costs seconds and favours none: all see the same
numbers, and spend what the recorded trials cost.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fivefold import errors
from fivefold.errors import DataError, RecipeError, UserError
from fivefold.files import write_text
from fivefold.quantity import Measurement
from fivefold.recipe import Recipe
from fivefold.study.driver import Phase, Report
from fivefold.study.in_turn import Turn
from fivefold.study.sampler import SearchSpace
from fivefold.study.trial import Outcome, Trial

_FAILURES = {
    Outcome.OUT_OF_MEMORY: errors.OutOfMemory, Outcome.TIMED_OUT: errors.TimedOut, Outcome.CRASHED: errors.Crashed,
    Outcome.NOT_FINITE: errors.NotFinite, Outcome.REFUSED: UserError,
}


@dataclass(frozen=True)
class Table:
    """Recipe -> its recorded trial. The parent must be among them."""

    trials: Mapping[str, Trial]

    @classmethod
    def of(cls, trials: Sequence[Trial]) -> Self:
        """Of a study's trials; those the cost model dropped were never run and are left out."""
        kept = {str(Recipe.parse(t.recipe)): t for t in trials if t.outcome is not Outcome.PREDICTED}
        if "parent" not in kept:
            raise DataError("the recorded trials hold no parent, so nothing can be compared with it; record it too")
        return cls(kept)

    @classmethod
    def load(cls, path: Path) -> Self:
        """From the JSON written by `save`. Raises DataError."""
        try:
            return cls.of([Trial.from_json(t) for t in json.loads(path.read_text(encoding="utf-8"))["trials"]])
        except (OSError, ValueError, KeyError, TypeError, RecipeError) as error:
            raise DataError(f"{path} is no table of trials ({type(error).__name__}); record it again") from None

    def save(self, path: Path) -> None:
        write_text(path, json.dumps({"trials": [t.to_json() for t in self.trials.values()]}, indent=1) + "\n")

    def space(self) -> TableSpace:
        """A search space that offers the table's recipes and nothing else."""
        levels: dict[str, dict[str, list[Any]]] = {}
        for text in self.trials:
            for technique in Recipe.parse(text):
                fields = levels.setdefault(technique.name, {})
                for name, value in vars(technique).items():
                    values = fields.setdefault(name, [])
                    if value not in values:
                        values.append(value)
        frozen = {
            name: {key: tuple(sorted(values, key=lambda v: (str(type(v)), v))) for key, values in fields.items()}
            for name, fields in levels.items()
        }
        return TableSpace(frozen, {}, None, frozenset(self.trials))


@dataclass(frozen=True)
class TableSpace(SearchSpace):
    known: frozenset[str] = frozenset()

    def recipe(self, parts: Mapping[str, Mapping[str, Any]]) -> Recipe | None:
        recipe = super().recipe(parts)
        return recipe if recipe is not None and str(recipe) in self.known else None

    def draw(self, rng: random.Random, tried: Collection[str]) -> Recipe | None:
        left = sorted(self.known - set(tried) - {"parent"})
        return Recipe.parse(rng.choice(left)) if left else None


class ReplayMeter:
    """A `Runner` that answers from a table. `sleep` is called with each phase's recorded seconds (a fake clock)."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def prepare(self) -> Mapping[str, float]:
        return {}

    def build(self, recipe: Recipe, number: int, phase: Phase) -> Report:
        trial = self._known(recipe)
        spent = _part(trial, ("build", "screen"))
        if trial.outcome.failed and not len(trial.screen):
            raise _failure(trial, spent)
        return Report(screen=trial.screen, made=trial.made, spent=spent, coverage=trial.coverage,
                      artifact=trial.artifact)

    def measure(self, recipe: Recipe, number: int, artifact: str | None, phase: Phase) -> Report:
        trial = self._known(recipe)
        spent = _part(trial, ("measure", "quality"))
        if trial.outcome.failed:
            raise _failure(trial, spent)
        if trial.outcome is not Outcome.MEASURED:
            raise UserError(f"{recipe} was never measured in the recorded study; choose from measured trials")
        return Report(measurement=trial.measurement, spent=spent)

    def in_turn(
        self, parent: Trial, trials: Sequence[Trial], turn: Turn, patience: float, phase: Phase
    ) -> tuple[Mapping[int, Measurement], Mapping[str, float]]:
        known = {t.number: self._known(Recipe.parse(t.recipe)).paired for t in trials}
        if lacking := [n for n, m in known.items() if not m.context]:
            raise UserError(f"trial {lacking[0]} was not measured in turn in the recorded study; leave that step out")
        return known, {}

    def _known(self, recipe: Recipe) -> Trial:
        try:
            return self.table.trials[str(recipe)]
        except KeyError:
            raise UserError(f"{recipe} is not in the table; propose one that is") from None


def _part(trial: Trial, phases: Sequence[str]) -> dict[str, float]:
    """The recorded seconds of these phases, and the parts they are made of."""
    details = {k: v for k, v in trial.spent.items() if k.startswith("step.") and "build" in phases}
    return {**{k: trial.spent[k] for k in phases if k in trial.spent}, **details}


def _failure(trial: Trial, spent: Mapping[str, float]) -> Exception:
    error: Any = _FAILURES[trial.outcome](trial.sentence)
    error.spent = dict(spent)
    return error
