"""Plan: what `optimize` would do, before anything is spent: what is searched, what is dropped and why, how far the
allowance goes.

The recipes are drawn with the study's own seed, priced by the cost model and judged by its objections, as the study
will do; a trial is priced at the cheaper quarter of them, since a search prefers what costs less. Nothing has been
measured yet, so times are rough (the table of `predictor`) and no recipe is dropped for being slower than a parent that
was never timed. Energy is power times time and needs the machine's power model.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from fivefold.meters.energy import PowerModel
from fivefold.quantity import Quantity
from fivefold.recipe import Recipe
from fivefold.study.optimize import Setup, setup
from fivefold.study.predictor import Forecast

SAMPLE = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """`objection` is the sentence with which the cost model would drop it, or ""."""

    recipe: str
    seconds: float
    size: float
    objection: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`recipes` is an upper bound of the space's size; `trials` how many the allowance is expected to pay for."""

    techniques: Sequence[str]
    dropped: Mapping[str, str]
    recipes: float
    candidates: Sequence[Candidate]
    baseline: Quantity
    trial: Quantity
    trials: Quantity
    time: Quantity
    energy: Quantity
    disk: Quantity

    @property
    def kept(self) -> list[Candidate]:
        return [c for c in self.candidates if not c.objection]


def plan(model: Any, **choices: Any) -> Plan:
    """`choices` are those of `optimize.setup`. Runs nothing; raises UserError for what does not exist."""
    return plan_of(setup(model, **choices))


def plan_of(made: Setup) -> Plan:
    policy = made.policy
    forecast = policy.predictor.after([])
    candidates = [_candidate(recipe, made, forecast) for recipe in _drawn(made)]
    kept = [c for c in candidates if not c.objection] or candidates
    answering = made.question_tokens / policy.predictor.physics(Recipe())["prefill"]
    each = sorted(c.seconds for c in kept)[len(kept) // 4] + answering if kept else 0.0
    baseline = sum(forecast.seconds(Recipe()).values()) + answering
    limit = None if policy.allowance.time is None else policy.allowance.time - policy.kept([])
    trials = policy.most if limit is None else max(0, int((limit - baseline) / max(each, 1e-9)))
    counted = trials if trials is not None else len(candidates)
    total = min(baseline + counted * each, limit if limit is not None else float("inf"))
    size = median(c.size for c in kept) if kept else 0.0
    return Plan(
        techniques=list(policy.space.levels), dropped=policy.space.dropped, recipes=policy.space.count(),
        candidates=candidates, baseline=_modelled(baseline, "s"), trial=_modelled(each, "s"),
        trials=_modelled(counted, "1"), time=_modelled(total, "s"), energy=_energy(made, total),
        disk=_modelled(counted * size, "byte"),
    )


def _drawn(made: Setup) -> list[Recipe]:
    space, found = made.policy.space, dict[str, Recipe]()
    for name in space.levels:
        alone = space.recipe({name: space.default(name)})
        if alone is not None:
            found[str(alone)] = alone
    rng = random.Random(made.seed)
    while len(found) < SAMPLE and (recipe := space.draw(rng, found)) is not None:
        found[str(recipe)] = recipe
    return list(found.values())


def _candidate(recipe: Recipe, made: Setup, forecast: Forecast) -> Candidate:
    predicted = forecast.predict(recipe)
    parent = {name: q.value for name, q in forecast.predict(Recipe()).items()}
    limits = forecast.objection(recipe, predicted, made.goal, {**parent, "request": None})
    return Candidate(
        recipe=str(recipe), seconds=sum(forecast.seconds(recipe).values()), size=predicted.value("size") or 0.0,
        objection=limits or "",
    )


def _energy(made: Setup, seconds: float) -> Quantity:
    """All cores busy for that long, by the machine's power model."""
    cores = made.machine.cores
    return PowerModel.of(made.machine).joules(wall=seconds, cpu=seconds * cores, cores=cores)


def _modelled(value: float, unit: str) -> Quantity:
    return Quantity(value=float(value), unit=unit, method="modelled", reason="a rough guess before any measurement")
