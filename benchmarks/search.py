"""Compare samplers on recorded trials at equal spend: ours, random, TPE, NSGA-II.

    python benchmarks/search.py table.json [--objectives latency,size,kl --budget "size<=0.5x"] [--out search.json]

`table.json` is a `fivefold.testing.Table` (`record.py` measures one; `--record STUDY` writes one from a study's
folder). Each sampler replays the table through the same policy (predict, screen, verify), five seeds, until its trials
have cost `--seconds` (default: a third of what the whole table cost). Reported: hypervolume of the front within the
budget over seconds spent, as a share of the hypervolume of the whole table's front, median and range over seeds; and at
which part of the spend ours has reached what another ends with. Without `--objectives` the main job's goal and one
without a budget are replayed. The numbers are the same on every machine; only the time to compute them differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from _common import number, publish
from _common import table as markdown

from fivefold.budget import Allowance, Budget, objectives
from fivefold.machine import Machine
from fivefold.model import Model, load
from fivefold.study.pareto import Goal, Point, front, hypervolume, point, values_of
from fivefold.study.policy import Policy, spent_seconds
from fivefold.study.predictor import Predictor
from fivefold.study.sampler import NAMES, make
from fivefold.study.study import Study
from fivefold.study.trial import Trial
from fivefold.testing import ReplayMeter, Table

SEEDS = 5
SHARES = tuple(n / 50 for n in range(1, 51))
SHOWN = range(4, 50, 5)
GOALS = (("latency,energy,size", "memory<=260MB, agreement>=0.85"), ("latency,size,kl", ""))
WANTED = 1 / 3


class Ruler:
    """Hypervolume of trials as a share of the whole table's; the reference is the table's worst place, 10 % beyond."""

    def __init__(self, table: Table, goal: Goal) -> None:
        self.goal = goal
        self.parent = values_of(table.trials["parent"])
        known = [p for t in table.trials.values() if (p := point(values_of(t), goal.objectives)) is not None]
        low, high = ([pick(c) for c in zip(*known, strict=True)] for pick in (min, max))
        self.reference = tuple(b + 0.1 * (b - a) for a, b in zip(low, high, strict=True))
        self.best = self._volume(list(table.trials.values()))

    def _volume(self, trials: Sequence[Trial]) -> float:
        points: list[Point] = []
        for trial in front(trials, self.goal, self.parent):
            place = point(values_of(trial), self.goal.objectives)
            assert place is not None
            points.append(place)
        return hypervolume(points, self.reference)

    def share(self, trials: Sequence[Trial]) -> float:
        return self._volume(trials) / self.best if self.best else 0.0


def replay(table: Table, goal: Goal, predictor: Predictor, name: str, seed: int, seconds: float) -> list[Trial]:
    """The trials a sampler would have run, in order."""
    policy = Policy(
        goal, table.space(), make(name, goal, predictor), predictor, Allowance(time=seconds), seed, len(table.trials)
    )
    with TemporaryDirectory() as folder:
        return Study(folder).run(policy, ReplayMeter(table), {}).trials


def curve(trials: Sequence[Trial], ruler: Ruler, seconds: float) -> list[float]:
    """Share of the best hypervolume after each of `SHARES` of the spend. A trial counts when it is paid for."""
    out = []
    for share in SHARES:
        paid, spent = [], 0.0
        for trial in trials:
            spent += spent_seconds([trial])
            if spent > share * seconds:
                break
            paid.append(trial)
        out.append(ruler.share(paid))
    return out


def compare(
    table: Table, goal: Goal, model: Model, machine: Machine, seconds: float, seeds: int = SEEDS
) -> dict[str, dict[str, list[float]]]:
    """Sampler -> hypervolume over spend: median, least and most over seeds, and trials run."""
    ruler = Ruler(table, goal)
    predictor = Predictor(machine, model)
    result: dict[str, dict[str, list[float]]] = {}
    for name in NAMES:
        runs = [replay(table, goal, predictor, name, seed, seconds) for seed in range(seeds)]
        curves = list(zip(*(curve(trials, ruler, seconds) for trials in runs), strict=True))
        result[name] = {
            "spend": [share * seconds for share in SHARES], "median": [median(c) for c in curves],
            "least": [min(c) for c in curves], "most": [max(c) for c in curves],
            "trials": [len(trials) for trials in runs],
        }
    return result


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--record", type=Path, help="folder of a study to write the table from, and stop")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--objectives")
    parser.add_argument("--budget", default="")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="write no fragment")
    given = parser.parse_args(arguments)
    if given.record:
        Table.of(Study.open(given.record).trials).save(given.table)
        return
    table = Table.load(given.table)
    seconds = given.seconds or spent_seconds(list(table.trials.values())) / 3
    model, machine = load(given.model), Machine.load()
    parts, kept = [f"{len(table.trials)} recorded trials, {seconds:.0f} s of them for each search."], {}
    for names, budget in ((given.objectives, given.budget),) if given.objectives else GOALS:
        found = compare(table, Goal(objectives(names), Budget.parse(budget)), model, machine, seconds, given.seeds)
        kept[f"{names} within {budget}"] = found
        within = f"budget `{budget}`" if budget else "no budget"
        what = (f"**{names}**, {within}. Share of the best hypervolume after each part of the spend, median of"
                f" {given.seeds} seeds.")
        parts += [what, shown(found), verdict(found)]
    if given.out:
        given.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    publish("search", "Samplers at equal spend", "\n\n".join(parts), packages=("optuna",), keep=not given.quick)


def shown(found: Mapping[str, Mapping[str, list[float]]]) -> str:
    rows = [
        [name, *(number(row["median"][i]) for i in SHOWN), f"{number(row['least'][-1])} to {number(row['most'][-1])}"]
        for name, row in found.items()
    ]
    return markdown(["sampler", *(f"{SHARES[i]:.0%}" for i in SHOWN), "range at 100 %"], rows)


def verdict(found: Mapping[str, Mapping[str, list[float]]]) -> str:
    """The part of the spend after which our median has reached the median another sampler ends with."""
    ours = found["fivefold"]["median"]
    parts = []
    for name, row in found.items():
        if name != "fivefold":
            when = next((s for s, v in zip(SHARES, ours, strict=True) if v >= row["median"][-1]), None)
            word = "not reached" if when is None or when > WANTED else "reached"
            parts.append(f"{name} {'never' if when is None else f'{when:.0%}'} (**{word}**)")
    return f"Ours has what another ends with after this part of the spend, goal a third: {', '.join(parts)}."


if __name__ == "__main__":
    main(sys.argv[1:])
