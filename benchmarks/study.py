"""Did the search keep its promises? Read from the records of a finished study; nothing is run.

    python benchmarks/study.py runs/demo [--quick]

Predictor: median |predicted / measured - 1| over the measured trials other than the parent. Screen: Spearman's rank
correlation between a trial's screen and its full measurement. Picks: trials the study recommends, and whether each one
decodes faster than the parent in the engine that serves it. Overhead: seconds of trials that were neither building nor
measuring, as a share of all. `--quick` writes nothing.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from _common import interval, number, publish, table

from fivefold.metrics import METRICS
from fivefold.study.explain import rank_correlation
from fivefold.study.pareto import Goal
from fivefold.study.picks import picks
from fivefold.study.policy import spent_seconds
from fivefold.study.predictor import errors
from fivefold.study.study import Study
from fivefold.study.trial import Trial


def predictor(trials: Sequence[Trial]) -> str:
    """Median error per metric; quality has no goal, for it is only ranked by."""
    rows = [
        [metric, METRICS[metric].resource, interval(q, 1, 100), str(q.n), _goal(metric, q.value)]
        for metric, q in errors(trials).items()
    ]
    heads = ["predictor", "resource", "median error, %", "trials", "goal < 10 %"]
    return table(heads, rows) if rows else "Predictor: no trial but the parent was both predicted and measured."


def _goal(metric: str, error: float | None) -> str:
    if METRICS[metric].resource == "quality" or error is None:
        return "-"
    return "reached" if error < 0.10 else "not reached"


def screen(trials: Sequence[Trial]) -> str:
    rows = []
    for metric in ("kl", "agreement", "loss"):
        rho = rank_correlation(trials, metric)
        rows.append([metric, number(rho.value), str(rho.n) if rho.value is not None else rho.reason])
    return table(["screen against final", "Spearman's rho", "trials"], rows)


def recommended(trials: Sequence[Trial], goal: Goal) -> str:
    found = picks(trials, goal)
    if not found:
        return "Picks: the study recommends nothing (goal: every pick decodes faster than the parent)."
    ratios = [p.against.get("decode") for p in found]
    faster = sum(q is not None and (q.value or 0.0) > 1 for q in ratios)
    surely = sum(q is not None and (q.low or 0.0) > 1 for q in ratios)
    rows = [
        [f"{p.role}: `{p.trial.recipe}`", *(interval(p.against.get(m)) for m in ("decode", "memory", "size", "energy")),
         interval(p.trial.measurement.get("agreement"), 3)]
        for p in found
    ]
    heads = ["pick", "decode x parent", "memory x", "size x", "energy x", "agreement"]
    verdict = "reached" if faster == len(found) else "not reached"
    return (
        f"Faster than the parent: {faster} of {len(found)} picks ({surely} with the whole interval);"
        f" goal 100 %, **{verdict}**.\n\n{table(heads, rows)}"
    )


def spending(trials: Sequence[Trial]) -> str:
    total = spent_seconds(trials)
    by_phase: Counter[str] = Counter()
    for trial in trials:
        by_phase.update({phase: s for phase, s in trial.spent.items() if "." not in phase})
    rows = [[phase, number(s, 1), number(100 * s / total, 1)] for phase, s in by_phase.most_common()]
    share = by_phase["overhead"] / total
    verdict = "reached" if share < 0.10 else "not reached"
    return (
        f"Overhead outside building and measuring: {share:.1%} of {total:.0f} s; goal < 10 %, **{verdict}**.\n\n"
        f"{table(['phase', 'seconds', '%'], rows)}"
    )


def outcomes(trials: Sequence[Trial]) -> str:
    counted = Counter(str(t.outcome.value) for t in trials)
    return table(["outcome", "trials"], [[name, str(n)] for name, n in counted.most_common()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    study = Study.open(given.study)
    trials, settings = study.trials, study.meta.get("settings", {})
    what = f"Budget `{settings.get('budget', '')}`, minimizing {settings.get('objectives', '')}; {len(trials)} trials."
    body = [predictor(trials), screen(trials), recommended(trials, study.goal), spending(trials), outcomes(trials)]
    publish("study", "What a search promised and what came", "\n\n".join([what, *body]), packages=("optuna",),
            keep=not given.quick)


if __name__ == "__main__":
    main()
