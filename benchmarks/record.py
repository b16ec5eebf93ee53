"""Measure a grid of recipes in full, whatever they promise: the table on which `search.py` compares samplers.

    python benchmarks/record.py table.json [--out runs/table] [--minutes 40]

A search measures only what looks promising, so its own trials would favour it; here every recipe of the grid (a way to
build, times a way to run) is built, screened and measured with two rounds of the chat workload. What the settings of
one technique share (the curvatures of `mixed_precision`) is prepared before, so that it is not the first setting alone
that pays for it. Killed, it goes on where it was. Recipes that do not fit are left out; those that fail stay in the
table as failures.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fivefold.budget import Allowance, Budget
from fivefold.errors import UserError
from fivefold.model import Model, load
from fivefold.recipe import Recipe
from fivefold.study.events import Event
from fivefold.study.optimize import prepared
from fivefold.study.policy import Build, Measure, Policy, Step, Stop
from fivefold.study.study import Study
from fivefold.study.trial import Outcome, Trial
from fivefold.testing import Table

BUILDS = (
    *(f'gguf(type="{t}")' for t in ("q8_0", "q5_1", "q5_0", "q4_0", "iq4_nl")),
    *(f"mixed_precision(bits={b})" for b in (4.5, 5.0, 5.5, 6.0, 6.6, 7.2)),
    'prune_depth(layers=2) + gguf(type="q8_0")', 'prune_depth(layers=2) + gguf(type="iq4_nl")',
)
RUNS = ("", "threads(count=1)", 'kv_cache(type="q8_0")', "prompt_lookup()", 'engine(type="openvino")')


def grid(model: Model) -> list[Recipe]:
    """Every build with every run that fits, in a fixed random order."""
    found = []
    for build in BUILDS:
        for run in RUNS:
            try:
                recipe = Recipe.parse(" + ".join(part for part in (build, run) if part))
                recipe.check(model)
                found.append(recipe)
            except UserError:
                continue
    random.Random(0).shuffle(found)
    return found


@dataclass(frozen=True)
class Everything(Policy):
    """Builds and measures each of `recipes` in turn."""

    recipes: tuple[Recipe, ...] = ()

    def next(self, trials: Sequence[Trial]) -> Step:
        if not trials:
            return super().next(trials)
        if trials[-1].outcome is Outcome.SCREENED:
            return Measure(trials[-1], 0.0)
        if self.left(trials) < 60:
            return Stop("the time is spent")
        known = {t.recipe for t in trials}
        for recipe in self.recipes:
            if str(recipe) not in known:
                return Build(recipe, self.predictor.after(trials).predict(recipe), 0.0)
        return Stop("the whole grid is measured")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/table"))
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--model", default="smollm2-135m")
    given = parser.parse_args(arguments)
    model = load(given.model)
    made, runner = prepared(
        model, given.out, rounds=2, budget=Budget.parse(""), objectives=("latency", "size", "kl"),
        allowance=Allowance(time=60 * given.minutes),
    )
    old = made.policy
    policy = Everything(
        old.goal, old.space, old.sampler, old.predictor, old.allowance, recipes=tuple(grid(model))
    )

    Recipe.parse("mixed_precision(bits=5.0)").apply(model.but(work=given.out / "warm"))

    def said(event: Event) -> None:
        trial = getattr(event, "trial", None)
        if isinstance(trial, Trial) and trial.outcome is not Outcome.SCREENED:
            print(f"{trial.number:3d} {trial.outcome:10s} {trial.recipe} {trial.sentence}", flush=True)

    trials = Study(given.out).run(policy, runner, made.settings, said).trials
    Table.of(trials).save(given.table)
    print(f"{len(trials)} trials written to {given.table}")


if __name__ == "__main__":
    main(sys.argv[1:])
