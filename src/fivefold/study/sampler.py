"""Sampler: proposes the next recipe. The seam is one method, `ask(history, space, rng)`.

A sampler keeps no state: everything it knows it reads from the trials so far, so a study that was killed goes on
exactly as one that was not. It never proposes a recipe that is already in the history, and returns None when nothing
is left. Failed and refused trials are part of the history and must teach.

`SearchSpace` is derived, never listed by hand: the techniques of the catalogue that can treat this model, each with the
values of its fields worth searching (`space.dimensions`), and groups of techniques that exclude each other because they
need a trait the other takes away. Which recipes fit is asked of `Recipe` itself.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fivefold.errors import RecipeError, UserError
from fivefold.model import Model, Trait
from fivefold.recipe import Recipe, Technique, catalogue
from fivefold.space import Dimension, dimensions
from fivefold.study.pareto import Goal
from fivefold.study.predictor import Predictor
from fivefold.study.trial import Trial

NAMES = ("fivefold", "random", "tpe", "nsga2")
LEVELS = 5
MOST = 4
"""Techniques that a random recipe holds at most, so that a long recipe is reached by steps that paid."""
TRIES = 200


class Sampler(Protocol):
    def ask(
        self, history: Sequence[Trial], space: SearchSpace, rng: random.Random, seconds: float = math.inf
    ) -> Recipe | None:
        """A recipe that is not in `history`, or None when the space is exhausted.

        A sampler that can tell proposes one that is expected to take `seconds` at most, if there is one.
        """
        ...


def make(name: str, goal: Goal, predictor: Predictor | None = None) -> Sampler:
    """A sampler by its public name. Raises UserError for an unknown one."""
    if name == "random":
        return Random()
    if name in ("tpe", "nsga2"):
        from fivefold.study._optuna import Optuna

        return Optuna(name, goal)
    if name == "fivefold":
        from fivefold.study._fivefold import Fivefold

        return Fivefold(goal, predictor)
    raise UserError(f"there is no sampler {name!r}; samplers: {', '.join(NAMES)}")


@dataclass(frozen=True)
class SearchSpace:
    """`levels[name]` maps each searched field to its values; `dropped` says why a technique is not searched."""

    levels: Mapping[str, Mapping[str, tuple[Any, ...]]]
    dropped: Mapping[str, str] = field(default_factory=dict)
    model: Model | None = None

    @classmethod
    def build(
        cls, model: Model, techniques: Mapping[str, type[Technique]] | None = None, batch: int = 1
    ) -> SearchSpace:
        """What can be searched on this model; each technique or value that cannot be is dropped with its sentence.

        A value stays when it is accepted alone or beside one technique that builds (an engine beside its format).
        With `batch` 1 there is never a second request, so techniques that choose the batch are dropped.
        """
        found = dict(catalogue() if techniques is None else techniques)
        dropped: dict[str, str] = {}
        raw: dict[str, dict[str, tuple[Any, ...]]] = {}
        for name, technique in found.items():
            lacking = [d.name for d in _fields(technique) if d.required and not d.searched]
            if lacking:
                dropped[name] = f"{name} needs {lacking[0]}=..., which cannot be searched"
            elif batch == 1 and Trait.OPEN_BATCH in technique.breaks:
                dropped[name] = f"{name} has nothing to decode together: the workload sends one request at a time"
            else:
                raw[name] = {d.name: grid(d) for d in _fields(technique) if d.searched}
        whole = cls(raw, {}, model)
        levels = {}
        for name in raw:
            kept, why = _accepted(name, whole)
            dropped |= why
            if name not in dropped:
                levels[name] = kept
        return cls(levels, dropped, model)

    def recipe(self, parts: Mapping[str, Mapping[str, Any]]) -> Recipe | None:
        """The recipe of these techniques, or None when it does not fit the model."""
        return None if self.objection(parts) else Recipe(*_made(parts))

    def objection(self, parts: Mapping[str, Mapping[str, Any]]) -> str:
        """Why these techniques do not fit together or on the model; "" when they do."""
        spelled = _spelled(parts)
        if spelled not in self._known:
            try:
                recipe = Recipe(*_made(parts))
                if self.model is not None:
                    recipe.check(self.model)
                self._known[spelled] = ""
            except UserError as error:
                self._known[spelled] = str(error)
        return self._known[spelled]

    @functools.cached_property
    def _known(self) -> dict[str, str]:
        return {}

    @functools.cached_property
    def groups(self) -> list[tuple[str, ...]]:
        """The techniques, those that exclude each other together: one takes away a trait that the other needs."""
        names = list(self.levels)
        clash = {
            (a, b): not _fit({a: self.default(a), b: self.default(b)}) for a, b in itertools.combinations(names, 2)
        }
        groups: list[list[str]] = []
        for name in names:
            home = next((g for g in groups if all(clash[other, name] for other in g)), None)
            if home is None:
                groups.append([name])
            else:
                home.append(name)
        return [tuple(g) for g in groups]

    def default(self, name: str) -> dict[str, Any]:
        """The technique's own defaults where it has them and they are searched, else the middle of the values."""
        known = {d.name: d.default for d in _fields(catalogue()[name])}
        return {
            key: known[key] if known[key] in values else values[len(values) // 2]
            for key, values in self.levels[name].items()
        }

    def variants(self, name: str) -> Iterator[dict[str, Any]]:
        """Every combination of the technique's values."""
        keys = list(self.levels[name])
        for values in itertools.product(*self.levels[name].values()):
            yield dict(zip(keys, values, strict=True))

    def count(self) -> float:
        """Upper bound on the number of recipes: each technique absent or at one of its settings."""
        return math.prod(1 + math.prod(len(v) for v in fields.values()) for fields in self.levels.values())

    def draw(self, rng: random.Random, tried: Collection[str]) -> Recipe | None:
        """A random recipe of 1 to `MOST` techniques that is not in `tried`; None when none is found."""
        groups = self.groups
        for _ in range(TRIES if groups else 0):
            picked = rng.sample(groups, min(len(groups), rng.randint(1, MOST)))
            names = [rng.choice(group) for group in picked]
            recipe = self.recipe({name: self.random_part(name, rng) for name in names})
            if recipe is not None and len(recipe) and str(recipe) not in tried:
                return recipe
        return next((r for r in self.small() if str(r) not in tried), None)

    def small(self) -> Iterator[Recipe]:
        """Every recipe of one or two techniques: what is left to try at the end of a small space."""
        settings = [(name, v) for name in self.levels for v in self.variants(name)]
        for size in (1, 2):
            for chosen in itertools.combinations(settings, size):
                if len({name for name, _ in chosen}) == size:
                    recipe = self.recipe(dict(chosen))
                    if recipe is not None:
                        yield recipe

    def random_part(self, name: str, rng: random.Random) -> dict[str, Any]:
        return {key: rng.choice(values) for key, values in self.levels[name].items()}


def _fields(technique: type) -> tuple[Dimension, ...]:
    return dimensions(technique)


def grid(dimension: Dimension) -> tuple[Any, ...]:
    """The values of a dimension that are tried: its choices, or `LEVELS` steps of its interval."""
    if dimension.search:
        return tuple(dimension.search)
    assert dimension.range is not None
    low, high = dimension.range.low, dimension.range.high
    logarithmic = dimension.range.log and low > 0

    def step(i: int) -> Any:
        share = i / (LEVELS - 1)
        value = low * (high / low) ** share if logarithmic else low + (high - low) * share
        return round(value) if dimension.kind == "int" else float(f"{value:.3g}")

    return tuple(dict.fromkeys(min(max(step(i), low), high) for i in range(LEVELS)))


def _accepted(name: str, space: SearchSpace) -> tuple[dict[str, tuple[Any, ...]], dict[str, str]]:
    """Values of a technique that are accepted in some setting, and why each of the others is not.

    It may also be accepted beside a technique that builds: a repair beside what it repairs, an engine beside the format
    it reads.
    """
    levels = space.levels[name]
    good: dict[str, set[Any]] = {key: set() for key in levels}
    why: dict[tuple[str, Any], str] = {}
    sentence = ""
    partners = list(_partners(name, space))
    for setting in itertools.islice(space.variants(name), 4096):
        if setting and all(value in good[key] for key, value in setting.items()):
            continue
        one = {name: setting}
        objection = space.objection(one)
        if objection and all(space.objection({**one, **partner}) for partner in partners):
            sentence = sentence or objection
            for pair in setting.items():
                why.setdefault(pair, objection)
            continue
        if not setting:
            return {}, {}
        for key, value in setting.items():
            good[key].add(value)
    if not all(good.values()) or (sentence and not levels):
        return {}, {name: sentence}
    kept = {key: tuple(v for v in values if v in good[key]) for key, values in levels.items()}
    return kept, {_spelled({name: {k: v}}): text for (k, v), text in why.items() if v not in good[k]}


def _partners(name: str, space: SearchSpace) -> Iterator[dict[str, dict[str, Any]]]:
    """Each technique that builds; for one that only says how to run also once per value of each of its fields."""
    for other, fields in space.levels.items():
        if other != name and not catalogue()[other].runtime:
            yield {other: space.default(other)}
            for key, values in fields.items() if catalogue()[name].runtime else ():
                for value in values:
                    yield {other: {**space.default(other), key: value}}


def _fit(parts: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the traits allow these techniques together, on whatever model."""
    try:
        Recipe(*_made(parts))
    except RecipeError:
        return False
    return True


def _made(parts: Mapping[str, Mapping[str, Any]]) -> list[Technique]:
    return [catalogue()[name](**values) for name, values in parts.items()]


def _spelled(parts: Mapping[str, Mapping[str, Any]]) -> str:
    return " + ".join(
        f"{name}({', '.join(f'{k}={v!r}' for k, v in values.items())})" for name, values in sorted(parts.items())
    )


def parts_of(recipe: Recipe, space: SearchSpace) -> dict[str, dict[str, Any]]:
    """The searched fields of each technique in a recipe."""
    return {t.name: {key: getattr(t, key) for key in space.levels.get(t.name, {})} for t in recipe}


def seen(history: Sequence[Trial]) -> set[str]:
    return {trial.recipe for trial in history}


class Random:
    """Uniform over techniques, then over their values."""

    def ask(
        self, history: Sequence[Trial], space: SearchSpace, rng: random.Random, seconds: float = math.inf
    ) -> Recipe | None:
        return space.draw(rng, seen(history))
