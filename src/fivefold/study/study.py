"""Study: asks for recipes, runs trials, keeps them and their front. Kill it at any moment; the same call goes on.

    study = Study(folder)
    study.run(model, budget=..., objectives=..., allowance=...)     # or read a finished one:
    study.trials, study.front(), study.pick()

`run` is a loop without state of its own: read the records, let `Policy` say the next step, do it, write the record.
What a killed process was doing has left no record and is simply proposed again; at most that one trial is lost. One
process at a time may run a study; anybody may read it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from fivefold.budget import Budget
from fivefold.errors import BudgetError, StoreError, TrialFailure, UserError
from fivefold.metrics import METRICS
from fivefold.quantity import Measurement
from fivefold.recipe import Recipe
from fivefold.study import events as ev
from fivefold.study.driver import Report, Runner
from fivefold.study.feasible import infeasible
from fivefold.study.in_turn import PHASE, failed, outcome_of
from fivefold.study.pareto import ASIDE, ON_TASKS, Goal, front, knee, values_of
from fivefold.study.policy import Build, Drop, InTurn, Measure, Policy, Stop, spent_seconds
from fivefold.study.store import Store
from fivefold.study.trial import Outcome, Trial


class Study:
    """The records in `folder`; reading needs no lock. Raises StoreError when they are damaged."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.store = Store(self.folder)

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """A study that exists. Raises StoreError when there is none in `folder`."""
        study = cls(folder)
        if not study.store.exists():
            raise StoreError(f"there is no study in {folder}; give the folder that was given to optimize --out")
        return study

    @property
    def trials(self) -> list[Trial]:
        return self.store.trials()

    @property
    def meta(self) -> dict[str, Any]:
        """`settings` the study was started with, `space` (what is searched and what was dropped and why), `ended`, and
        `apart`: why picks were not measured in turn with the parent, or ""."""
        return self.store.meta()

    @property
    def goal(self) -> Goal:
        settings = self.meta.get("settings", {})
        return Goal(tuple(settings.get("objectives", "").split(",")), Budget.parse(settings.get("budget", "")))

    @property
    def parent(self) -> Trial | None:
        """The measured baseline."""
        return next((t for t in self.trials if t.recipe == "parent" and t.outcome is Outcome.MEASURED), None)

    def front(self, budget: Budget | None = None) -> list[Trial]:
        """Measured trials within the budget (the study's own if None) that no other dominates."""
        goal = self.goal if budget is None else replace(self.goal, budget=budget)
        trials = self.trials
        return front(trials, goal, _parent_values(trials))

    def pick(self, budget: Budget | None = None, by: str = "knee") -> Trial:
        """One trial of the front: its knee, or the best in the metric `by`.

        Raises Infeasible (`feasible.NothingFits`, with its data) when nothing meets the budget, BudgetError when `by`
        is no metric that was measured.
        """
        goal = self.goal if budget is None else replace(self.goal, budget=budget)
        trials = self.trials
        parent = _parent_values(trials)
        if aside := [m for m in (*goal.metrics, by) if m in ASIDE]:
            raise BudgetError(f"{aside[0]} is not measured in a study, because {ASIDE[aside[0]]}")
        unasked = [m for m in goal.metrics if m in ON_TASKS and all(t.value(m) is None for t in trials)]
        if unasked and parent:
            raise BudgetError(f"no trial has a measured {unasked[0]}; optimize with --task in another folder")
        found = front(trials, goal, parent)
        if not found:
            raise infeasible(trials, goal.budget, parent)
        if by == "knee":
            # As in `picks`: the parent may lie on its own front; "change nothing" is no answer where there is another.
            chosen = knee([t for t in found if t.recipe != "parent"] or found, goal)
            assert chosen is not None
            return chosen
        if by not in METRICS:
            raise BudgetError(f"there is no metric {by!r} to pick by; use knee, or one of {', '.join(METRICS)}")
        sign = 1.0 if METRICS[by].better == "lower" else -1.0
        allowed = [t for t in trials if goal.budget.met(values_of(t), parent)]
        known = [(sign * v, t.number, t) for t in allowed if (v := t.value(by)) is not None]
        if not known:
            raise BudgetError(f"no trial has a measured {by}; pick by one of {', '.join(goal.objectives)}")
        return min(known)[2]

    def run(
        self, policy: Policy, runner: Runner, settings: Mapping[str, str], events: ev.Watcher | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Self:
        """Go on until the policy stops. Raises Busy; UserError when `settings` differ or the parent cannot be measured.

        `settings` identify the study; the allowance is not among them, so more can be allowed later. `facts` are kept
        for readers: "name", "machine", and "inputs" (workload, text and country by name).
        """
        with self.store.writing() as store:
            store.settle(settings)
            for name, fact in (facts or {}).items():
                store.set_meta(name, fact)
            store.set_meta("space", {"levels": policy.space.levels, "dropped": policy.space.dropped})
            _Run(self, policy, runner, events or _silent).loop()
        return self


class _Run:
    """One process working on a study."""

    def __init__(self, study: Study, policy: Policy, runner: Runner, tell: ev.Watcher) -> None:
        self.study, self.store, self.policy, self.runner, self.tell = study, study.store, policy, runner, tell
        self.front: tuple[int, ...] = ()
        self.prepared: dict[str, float] = {}

    def loop(self) -> None:
        trials = self.store.trials()
        if trials and trials[0].outcome not in (Outcome.MEASURED, Outcome.SCREENED):
            trials = []
        self.tell(ev.Started(str(self.study.folder), len(trials)))
        start = time.perf_counter()
        try:
            spent = self.runner.prepare()
        except TrialFailure as error:
            raise UserError(f"the parent itself could not be measured ({error}); correct that first") from None
        rest = max(0.0, time.perf_counter() - start - sum(spent.values()))
        self.prepared = _summed({"reference": rest}, spent)
        while True:
            step = self.policy.next(trials)
            if isinstance(step, Stop):
                self.store.set_meta("ended", step.why)
                self.store.set_meta("apart", step.apart)
                self.tell(ev.Ended(step.why))
                return
            if isinstance(step, InTurn):
                self._in_turn(step)
                trials = self.store.trials()
                continue
            trial = self._do(step, trials)
            self.store.put(trial)
            trials = self.store.trials()
            self._report(trial, trials)
            if trial.recipe == "parent" and trial.outcome.failed:
                raise UserError(f"the parent itself could not be measured ({trial.sentence}); correct that first")

    def _do(self, step: Build | Drop | Measure, trials: list[Trial]) -> Trial:
        number = len(trials)
        if isinstance(step, Drop):
            return Trial(
                number=number, recipe=str(step.recipe), outcome=Outcome.PREDICTED, sentence=step.sentence,
                predicted=step.predicted, at=_now(),
            )
        if isinstance(step, Build):
            blank = Trial(
                number=number, recipe=str(step.recipe), outcome=Outcome.SCREENED, predicted=step.predicted, at=_now()
            )
            if not number:
                blank = blank.but(spent=self.prepared)
            self.tell(ev.TrialStarted(number, blank.recipe, "build", step.expected))
            return self._rung(blank, lambda: self.runner.build(step.recipe, number, self._phase(number)))
        trial = step.trial
        self.tell(ev.TrialStarted(trial.number, trial.recipe, "measure", step.expected))
        recipe = Recipe.parse(trial.recipe)
        return self._rung(
            trial.but(outcome=Outcome.MEASURED),
            lambda: self.runner.measure(recipe, trial.number, trial.artifact, self._phase(trial.number)),
        )

    def _in_turn(self, step: InTurn) -> None:
        """Every trial of the step gets its ratios, or the sentence why not; its share of the seconds is on record."""
        numbers = ", ".join(str(t.number) for t in step.trials)
        self.tell(ev.TrialStarted(step.parent.number, f"the parent and {numbers}", PHASE, step.turn.expected))
        start, count = time.perf_counter(), len(step.trials)
        found: Mapping[int, Measurement]
        try:
            found, spent = self.runner.in_turn(
                step.parent, step.trials, step.turn, step.patience, self._phase(step.parent.number)
            )
        except (StoreError, KeyboardInterrupt):
            raise
        except (TrialFailure, UserError) as error:
            found, spent = {}, getattr(error, "spent", {})
            missing = failed(outcome_of(error), str(error))
        else:
            missing = failed(Outcome.CRASHED, "the measuring process said nothing of it")
        spent = {k: v for k, v in spent.items() if "." in k} | {PHASE: time.perf_counter() - start}
        done = [
            t.but(paired=found.get(t.number, missing), spent=_summed(t.spent, {k: v / count for k, v in spent.items()}))
            for t in step.trials
        ]
        self.store.put(*done)
        self.tell(ev.Paired(tuple(done)))
        self.tell(spending(self.store.trials()))

    def _rung(self, trial: Trial, work: Any) -> Trial:
        """The trial after one phase; a failure is a result."""
        start = time.perf_counter()
        try:
            report: Report = work()
        except (StoreError, KeyboardInterrupt):
            raise
        except TrialFailure as error:
            return _failed(trial, Outcome(error.outcome), error, time.perf_counter() - start)
        except UserError as error:
            return _failed(trial, Outcome.REFUSED, error, time.perf_counter() - start)
        return trial.but(
            screen=report.screen if len(report.screen) else trial.screen,
            measurement=report.measurement if len(report.measurement) else trial.measurement,
            made=report.made or trial.made, coverage=report.coverage or trial.coverage,
            artifact=report.artifact or trial.artifact,
            spent=_summed(trial.spent, _with_overhead(report.spent, time.perf_counter() - start)), at=_now(),
        )

    def _phase(self, number: int) -> Any:
        return lambda phase: self.tell(ev.PhaseStarted(number, phase))

    def _report(self, trial: Trial, trials: list[Trial]) -> None:
        self.tell(ev.TrialFinished(trial))
        found = front(trials, self.policy.goal, _parent_values(trials))
        numbers = tuple(t.number for t in found)
        if numbers != self.front:
            self.front = numbers
            self.tell(ev.FrontChanged(tuple(found)))
        self.tell(spending(trials))


def spending(trials: list[Trial]) -> ev.Spent:
    """What the trials have cost the study so far."""

    def total(key: str) -> float | None:
        known = [t.spent[key] for t in trials if key in t.spent]
        return sum(known) if known else None

    made = {t.artifact: t.measurement.value("size") or 0.0 for t in trials if t.artifact}
    return ev.Spent(spent_seconds(trials), total("energy.J"), total("money.USD"), sum(made.values()))


def _failed(trial: Trial, outcome: Outcome, error: Exception, wall: float) -> Trial:
    spent = _summed(trial.spent, _with_overhead(getattr(error, "spent", {}), wall))
    return trial.but(outcome=outcome, sentence=str(error), spent=spent, at=_now())


def _with_overhead(now: Mapping[str, float], wall: float) -> dict[str, float]:
    """What the wall clock saw beyond the phases is overhead."""
    overhead = max(0.0, wall - sum(s for phase, s in now.items() if "." not in phase))
    return {**now, "overhead": now.get("overhead", 0.0) + overhead}


def _summed(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    return {phase: before.get(phase, 0.0) + now.get(phase, 0.0) for phase in {**before, **now}}


def _parent_values(trials: list[Trial]) -> Mapping[str, float | None]:
    parent = next((t for t in trials if t.recipe == "parent"), None)
    return values_of(parent) if parent else {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _silent(event: ev.Event) -> None:
    return None
