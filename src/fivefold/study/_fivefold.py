"""Our sampler: predict, then take the recipe with the largest expected gain per second it will cost.

Three sources of knowledge. The cost model of the machine (`predictor`) and earlier records of what techniques do to
quality (`records`) give each recipe a prior. A Gaussian process over the techniques in a recipe corrects it by what the
trials showed: its kernel is linear in "which techniques, at which values" (effects add up in log2) plus the square of
the overlap (pairs may interact), so one trial of a technique teaches something about every recipe that holds it.
Failures give each technique and each pair a chance of working.

The score of a candidate is its expected gain in hypervolume, over draws from the posterior that meet the budget, times
its chance of working, divided by its expected seconds. A new run-time setting of an artifact that is already built
costs no build and so comes early by itself. Candidates are each technique alone, neighbours of the best trials, their
crossings, and some at random (Emmerich 2006 for the gain; Snoek et al. 2012 for the gain per second).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivefold.metrics import METRICS
from fivefold.quantity import Quantity
from fivefold.recipe import Recipe, catalogue
from fivefold.study import records
from fivefold.study.pareto import Goal, Point, Values, coordinate, point, ranks
from fivefold.study.predictor import Forecast, Predictor
from fivefold.study.sampler import SearchSpace, parts_of, seen
from fivefold.study.trial import Outcome, Trial, estimate
from fivefold.techniques._shared.gguf_types import bits

ALONE = 12
"""Settings of each technique alone that are considered at each step."""
SEEDS_FIRST, DRAWS, POINTS, RANDOM, BEST, MUTATIONS = 4, 32, 1024, 24, 6, 24
NOISE, SCREEN_NOISE, PAIR = 0.03, 0.15, 0.1
FAR = 0.95
RUNTIME_QUALITY = 0.15
"""What techniques that change no weight are expected to do to quality, as a share of what the others do."""
WORTH = 0.25
"""A technique is first tried alone if that promises at least this share of what the best candidate does."""
Parts = dict[str, dict[str, Any]]
Array = NDArray[np.float64]


class Fivefold:
    def __init__(self, goal: Goal, predictor: Predictor | None = None) -> None:
        self.goal, self.predictor = goal, predictor

    def ask(
        self, history: Sequence[Trial], space: SearchSpace, rng: random.Random, seconds: float = math.inf
    ) -> Recipe | None:
        tried = seen(history)
        forecast = self.predictor.after(history) if self.predictor else None
        parent = estimate(history[0]) if history else {}
        pool = [r for r in self._pool(history, space, rng, parent) if str(r) not in tried]
        if forecast:
            pool = [r for r in pool if not forecast.objection(r, forecast.predict(r), self.goal, parent)]
            pool = [r for r in pool if sum(forecast.seconds(r).values()) <= seconds] or pool
        if not pool:
            return space.draw(rng, tried)
        alone = {t.recipe for t in history}
        seeds = [r for r in pool if len(r) == 1 and not any(_same_technique(r, text) for text in alone)]
        rounds = sum(t.outcome is not Outcome.PREDICTED for t in history)
        scores = dict(zip(pool, self._scores(pool, history, space, forecast, parent, rng), strict=True))
        best = max(pool, key=scores.__getitem__)
        if seeds and (rounds <= SEEDS_FIRST or rounds % 2 == 0):
            seed = max(seeds, key=scores.__getitem__)
            return seed if scores[seed] >= WORTH * scores[best] else best
        return best

    def _pool(
        self, history: Sequence[Trial], space: SearchSpace, rng: random.Random, parent: Values
    ) -> list[Recipe]:
        found: dict[str, Recipe] = {}

        def add(parts: Parts) -> None:
            recipe = space.recipe(parts)
            if recipe is not None and len(recipe):
                found.setdefault(str(recipe), recipe)

        for name in space.levels:
            add({name: space.default(name)})
            variants = list(space.variants(name))
            for variant in rng.sample(variants, min(ALONE, len(variants))):
                add({name: variant})
        best = [parts_of(Recipe.parse(t.recipe), space) for t in self._best(history, parent)]
        for parts in best:
            for changed in _neighbours(parts, space, rng):
                add(changed)
        for a, b in itertools.combinations(best, 2):
            add(_crossed(a, b, rng))
        for _ in range(RANDOM):
            recipe = space.draw(rng, ())
            if recipe is not None:
                found.setdefault(str(recipe), recipe)
        return list(found.values())

    def _best(self, history: Sequence[Trial], parent: Values) -> list[Trial]:
        """The best few trials by rank under constraint domination, built ones only."""
        known = [
            (p, t) for t in history if t.outcome in (Outcome.MEASURED, Outcome.SCREENED)
            and (p := point(estimate(t), self.goal.of_screen().objectives)) is not None
        ]
        layers = ranks([p for p, _ in known], [self._excess(estimate(t), parent) for _, t in known])
        order = sorted(range(len(known)), key=lambda i: (layers[i], -known[i][1].number))
        return [known[i][1] for i in order[:BEST]]

    def _excess(self, values: Values, parent: Values) -> float:
        excess = self.goal.of_screen().budget.excess(values, parent)
        return excess if math.isfinite(excess) else 10.0

    def _scores(
        self, pool: Sequence[Recipe], history: Sequence[Trial], space: SearchSpace, forecast: Forecast | None,
        parent: Values, rng: random.Random,
    ) -> list[float]:
        noise = np.random.default_rng(rng.randrange(2**32))
        names = self.goal.metrics
        draws = {m: self._posterior(m, pool, history, space, forecast, parent, noise) for m in names}
        feasible = np.ones((len(pool), DRAWS), dtype=bool)
        miss = np.zeros((len(pool), DRAWS))
        for limit in self.goal.budget:
            bound = limit.bound(parent)
            if bound is not None and limit.metric in draws:
                gap = draws[limit.metric] - coordinate(limit.metric, bound)
                feasible &= gap <= 0
                miss += np.maximum(gap, 0)
        places = np.stack([draws[m] for m in self.goal.objectives], axis=-1)
        gain = expected_gain(places, feasible, self._front(history, parent), self._parent_point(parent), noise)
        gain += 1e-3 / (1 + miss.mean(axis=1)) + 1e-4
        cost = self._cost(pool, history, space, forecast)
        works = chances(history)
        return [float(g) * works(r) / c for g, r, c in zip(gain, pool, cost, strict=True)]

    def _front(self, history: Sequence[Trial], parent: Values) -> list[Point]:
        return [
            p for t in history if t.outcome is Outcome.MEASURED and self.goal.budget.met(estimate(t), parent)
            and (p := point(estimate(t), self.goal.objectives)) is not None
        ]

    def _parent_point(self, parent: Values) -> Point:
        return point(parent, self.goal.objectives) or (0.0,) * len(self.goal.objectives)

    def _posterior(
        self, metric: str, pool: Sequence[Recipe], history: Sequence[Trial], space: SearchSpace,
        forecast: Forecast | None, parent: Values, noise: np.random.Generator,
    ) -> Array:
        """Draws of the coordinate, shape (recipes, DRAWS)."""
        base = parent.get(metric)
        start = coordinate(metric, base) if base is not None else 0.0

        def prior(recipe: Recipe) -> float:
            guess = forecast.predict(recipe).value(metric) if forecast else None
            if guess is None and self.predictor:
                guess = records.guess(metric, recipe, self.predictor.bits_per_weight(recipe), base)
            return start if guess is None else coordinate(metric, guess)

        data = []
        for trial in history:
            seen_fully = trial.outcome is Outcome.MEASURED
            found = (trial.measurement if seen_fully else trial.screen).get(metric)
            if found is not None and found.value is not None and math.isfinite(found.value):
                recipe, noise_ = Recipe.parse(trial.recipe), NOISE if seen_fully else SCREEN_NOISE
                data.append((recipe, coordinate(metric, found.value) - prior(recipe), doubt(metric, found, noise_)))
        quality = METRICS[metric].resource == "quality"
        mean, spread = regress(data, pool, space, RUNTIME_QUALITY if quality else 1.0)
        centre = np.array([prior(r) for r in pool]) + mean
        return centre[:, None] + spread[:, None] * noise.standard_normal((len(pool), DRAWS))

    def _cost(
        self, pool: Sequence[Recipe], history: Sequence[Trial], space: SearchSpace, forecast: Forecast | None
    ) -> list[float]:
        """Expected seconds of each recipe: the forecast's, else regressed on what trials cost."""
        if forecast:
            return [max(0.5, sum(forecast.seconds(r).values())) for r in pool]
        spent = [(Recipe.parse(t.recipe), math.log(s)) for t in history if (s := seconds_spent(t)) > 0]
        if not spent:
            return [1.0] * len(pool)
        middle = sum(x for _, x in spent) / len(spent)
        mean, _ = regress([(r, x - middle, 0.3) for r, x in spent], pool, space)
        return [math.exp(middle + float(x)) for x in mean]


def doubt(metric: str, found: Quantity, usual: float) -> float:
    """Standard error in coordinates: of quality by its interval, else the usual one."""
    if METRICS[metric].resource != "quality" or found.low is None or found.high is None:
        return usual
    return max(1e-3, abs(coordinate(metric, found.high) - coordinate(metric, found.low)) / 3.92)


def seconds_spent(trial: Trial) -> float:
    return sum(s for phase, s in trial.spent.items() if "." not in phase)


def regress(
    data: Sequence[tuple[Recipe, float, float]], pool: Sequence[Recipe], space: SearchSpace, runtime: float = 1.0
) -> tuple[Array, Array]:
    """Posterior mean and standard deviation for `pool` from (recipe, residual, noise) by the kernel of the module.

    `runtime` scales what is expected of techniques that change no weight.
    """
    index = _features(space)
    weight = np.array([runtime if catalogue()[name].runtime else 1.0 for name, *_ in index])
    xs, xa = (x * weight for x in _encode(pool, index))
    scale = max(0.05, float(np.mean([y * y for _, y, _ in data])) ** 0.5 if data else 1.0)
    prior = _kernel(xs, xa, xs, xa).diagonal()
    if not data:
        return np.zeros(len(pool)), scale * np.sqrt(prior)
    ds, da = (x * weight for x in _encode([r for r, _, _ in data], index))
    y = np.array([v for _, v, _ in data]) / scale
    noise = np.array([n for _, _, n in data]) / scale
    k = _kernel(ds, da, ds, da) + np.diag(noise**2 + 1e-6)
    cross = _kernel(xs, xa, ds, da)
    mean = cross @ np.linalg.solve(k, y)
    variance = prior - np.einsum("ij,ji->i", cross, np.linalg.solve(k, cross.T))
    return scale * mean, scale * np.sqrt(np.maximum(variance, 1e-6))


def _features(space: SearchSpace) -> dict[tuple[str, str, Any], int]:
    """(technique, "", "") for presence, (technique, field, value) for each value."""
    keys: list[tuple[str, str, Any]] = []
    for name, fields in space.levels.items():
        keys.append((name, "", ""))
        keys += [(name, key, value) for key, values in fields.items() for value in values]
    return {key: i for i, key in enumerate(keys)}


def _encode(recipes: Sequence[Recipe], index: dict[tuple[str, str, Any], int]) -> tuple[Array, Array]:
    """Settings, and presence alone: shapes (recipes, features). Values with a size share with their neighbours."""
    settings, presence = np.zeros((len(recipes), len(index))), np.zeros((len(recipes), len(index)))
    by_field: dict[tuple[str, str], list[tuple[Any, int]]] = {}
    for (name, key, value), i in index.items():
        by_field.setdefault((name, key), []).append((value, i))
    for row, recipe in enumerate(recipes):
        for t in recipe:
            for (name, key), places in by_field.items():
                if name != t.name:
                    continue
                if key == "":
                    settings[row, places[0][1]] = presence[row, places[0][1]] = 1.0
                    continue
                for i, share in _likeness(getattr(t, key), tuple(places)):
                    settings[row, i] = share
    return settings, presence


@functools.lru_cache(maxsize=4096)
def _likeness(now: Any, places: tuple[tuple[Any, int], ...]) -> tuple[tuple[int, float], ...]:
    """(feature, share) of a value: its own, and where values have a size those of the next smaller and larger ones."""
    sizes = [_size(v) for v, _ in places]
    order = sorted({s for s in sizes if s is not None})
    mine = _size(now)
    at = order.index(mine) if None not in sizes and mine in order else None
    out = []
    for (value, i), size in zip(places, sizes, strict=True):
        if value == now and type(value) is type(now):
            out.append((i, 0.7))
        elif at is not None and size is not None and abs(order.index(size) - at) <= 1:
            out.append((i, 0.4))
    return tuple(out)


def _size(value: Any) -> float | None:
    """What orders a value: a number itself, a storage type by its bits per weight."""
    if isinstance(value, str):
        with contextlib.suppress(KeyError):
            return bits(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _kernel(xs: Array, xa: Array, ys: Array, ya: Array) -> Array:
    overlap = xa @ ya.T
    out: Array = xs @ ys.T + PAIR * overlap * (overlap - 1)
    return out


def expected_gain(
    places: Array, feasible: NDArray[np.bool_], front: Sequence[Point], parent: Point, noise: np.random.Generator
) -> Array:
    """Mean hypervolume each candidate adds, as a share of the box from the best place drawn to the reference.

    The reference lies beyond the worst that is drawn, so that a new compromise counts however far from the known ones.
    `places` has shape (candidates, draws, objectives). By sampling: the share of points of the box that a draw
    dominates and the front does not.
    """
    everything = np.concatenate([places.reshape(-1, places.shape[-1]), np.array([parent, *front])])
    known = np.array([parent, *front])
    low = np.quantile(everything, 0.02, axis=0)
    low, worst = np.minimum(low, known.min(axis=0)), np.maximum(known.max(axis=0), np.quantile(everything, FAR, axis=0))
    high = worst + 0.1 * np.maximum(worst - low, 1e-6)
    box = low + noise.random((POINTS, places.shape[-1])) * (high - low)
    for p in front:
        box = box[~np.all(box >= np.array(p), axis=1)]
    out = np.zeros(len(places))
    for i, draws in enumerate(places):
        kept = draws[feasible[i]]
        if len(kept) and len(box):
            out[i] = np.all(box[None] >= kept[:, None], axis=-1).sum() / (POINTS * DRAWS)
    return out


def chances(history: Sequence[Trial]) -> Callable[[Recipe], float]:
    """Chance that a recipe works: the least (worked + 1) / (worked + failed + 1) over its techniques and pairs.

    A failure of a technique alone weighs four times: nothing else can be to blame.
    """
    worked: dict[frozenset[str], float] = {}
    failed: dict[frozenset[str], float] = {}
    for trial in history:
        if trial.outcome is Outcome.PREDICTED:
            continue
        names = sorted({t.name for t in Recipe.parse(trial.recipe)})
        table = failed if trial.outcome.failed else worked
        weight = 4.0 if trial.outcome.failed and len(names) == 1 else 1.0
        for subset in _subsets(names):
            table[subset] = table.get(subset, 0.0) + weight

    def chance(recipe: Recipe) -> float:
        subsets = _subsets(sorted(t.name for t in recipe))
        return min(
            ((worked.get(s, 0.0) + 1) / (worked.get(s, 0.0) + failed.get(s, 0.0) + 1) for s in subsets), default=1.0
        )

    return chance


def _subsets(names: Sequence[str]) -> list[frozenset[str]]:
    return [frozenset(c) for size in (1, 2) for c in itertools.combinations(names, size)]


def _same_technique(recipe: Recipe, text: str) -> bool:
    """Whether `text` is one technique alone, the same as the recipe's only one."""
    return " + " not in text and text.partition("(")[0] == recipe.techniques[0].name


def _neighbours(parts: Parts, space: SearchSpace, rng: random.Random) -> Iterator[Parts]:
    """One change each: drop a technique, change one value, add a technique, or exchange one for another."""
    for name in parts:
        yield {n: v for n, v in parts.items() if n != name}
        for key, values in space.levels.get(name, {}).items():
            for value in values:
                if value != parts[name][key]:
                    yield {**parts, name: {**parts[name], key: value}}
    names = [n for n in space.levels if n not in parts]
    for name in names:
        for _ in range(max(1, MUTATIONS // max(1, len(names)))):
            yield {**parts, name: space.random_part(name, rng)}
        if parts:
            lost = rng.choice(list(parts))
            yield {**{n: v for n, v in parts.items() if n != lost}, name: space.random_part(name, rng)}


def _crossed(a: Parts, b: Parts, rng: random.Random) -> Parts:
    """Each technique from either parent; one that only one of them has with probability two thirds."""
    out: Parts = {}
    for name in sorted({*a, *b}):
        choices = [p[name] for p in (a, b) if name in p]
        if len(choices) == 2 or rng.random() < 2 / 3:
            out[name] = rng.choice(choices)
    return out

