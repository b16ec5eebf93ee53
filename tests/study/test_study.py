"""Kill it at any moment: the same command ends where an undisturbed one ends. And what a finished study answers."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_up import formula, trial
from run_made_up import policy, runner

from fivefold.budget import Budget
from fivefold.errors import BudgetError, Busy, Infeasible, StoreError, TimedOut, UserError
from fivefold.metrics import METRICS
from fivefold.model import Model
from fivefold.quantity import Measurement, Quantity
from fivefold.recipe import Recipe
from fivefold.study import events as ev
from fivefold.study.driver import Phase, Report
from fivefold.study.feasible import NothingFits
from fivefold.study.pareto import Goal, dominates, point, values_of
from fivefold.study.picks import picks
from fivefold.study.policy import Stop, promoted, spent_seconds
from fivefold.study.study import Study
from fivefold.study.trial import Outcome, Trial

HERE = Path(__file__).parent
KILLS = 20
SETTINGS = {"objectives": "latency,size,kl", "budget": "size<=0.9x"}


def start(model: Model, out: Path, sampler: str, pause: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(HERE / "run_made_up.py"), str(model.path), str(out), sampler, str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def told(trials: list[Trial]) -> list[tuple[int, str, Outcome, float | None]]:
    return [(t.number, t.recipe, t.outcome, t.paired.value("latency")) for t in trials]


@pytest.mark.parametrize("sampler", ["fivefold", "random"])
def test_killed_at_random_moments_it_ends_where_an_undisturbed_one_ends(
    sampler: str, bare: Model, tmp_path: Path
) -> None:
    whole = told(Study(tmp_path / "whole").run(policy(bare.path, sampler), runner(), {"sampler": sampler}).trials)
    rng, out, kills, known = random.Random(sampler), tmp_path / "0", 0, 0
    assert any(ratio for *_, ratio in whole), "the last step is part of it"
    while kills < KILLS:
        child = start(bare, out, sampler, 0.6)
        while child.poll() is None and not Study(out).trials:
            time.sleep(0.02)
        time.sleep(rng.random())
        kills += child.poll() is None
        child.kill()
        child.communicate()
        now = told(Study(out).trials)
        assert len(now) >= known, "a trial on record was lost"
        assert [recipe for _, recipe, *_ in now] == [recipe for _, recipe, *_ in whole[: len(now)]]
        known = len(now)
        if now == whole:
            out, known = tmp_path / str(kills), 0
    assert start(bare, out, sampler, 0.0).communicate(timeout=120)[0].decode().strip() == "finished"
    assert told(Study(out).trials) == whole


@pytest.fixture(scope="module")
def done(bare: Model, tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study(tmp_path_factory.mktemp("study"))
    return study.run(policy(bare.path, "fivefold", 25), runner(), SETTINGS)


def test_a_finished_study_goes_no_further(done: Study, bare: Model) -> None:
    before = done.trials
    done.run(policy(bare.path, "fivefold", 25), runner(), SETTINGS)
    assert told(done.trials) == told(before)
    assert done.meta["ended"] == "25 trials were run, as many as asked for"


def test_the_parent_comes_first_and_the_better_half_is_measured(done: Study) -> None:
    trials = done.trials
    assert (trials[0].recipe, trials[0].outcome) == ("parent", Outcome.MEASURED)
    built = [t for t in trials[1:] if t.outcome in (Outcome.MEASURED, Outcome.SCREENED)]
    measured = [t for t in built if t.outcome is Outcome.MEASURED]
    assert len(built) / 2 <= len(measured) < len(built)
    assert all(t.sentence for t in trials if t.outcome is Outcome.PREDICTED or t.outcome.failed)
    assert len({t.recipe for t in trials}) == len(trials)
    assert promoted(trials, done.goal) is None


def screened(number: int, recipe: str, low: float, high: float) -> Trial:
    values = {"agreement": ((low + high) / 2, low, high), "size": (50e6, None, None), "latency": (1e-3, None, None)}
    screen = Measurement({
        name: Quantity(value=v, unit=METRICS[name].unit, method="measured", low=a, high=b, n=9)
        for name, (v, a, b) in values.items()
    })
    return Trial(number=number, recipe=recipe, outcome=Outcome.SCREENED, screen=screen, predicted=screen)


@pytest.mark.parametrize("within", [True, False])
def test_what_clearly_misses_the_budget_is_not_measured_once_something_meets_it(within: bool) -> None:
    goal = Goal(("latency", "size"), Budget.parse("agreement>=0.85"))
    parent = trial(0, "parent", latency=4e-3, size=500e6, agreement=1.0)
    other = trial(1, 'gguf(type="q8_0")', latency=2e-3, size=200e6, agreement=0.94 if within else 0.80)
    worse = trial(3, "prune_depth(layers=2)", latency=3e-3, size=400e6, agreement=0.30)
    clear = screened(2, 'gguf(type="q4_0")', 0.60, 0.70)
    assert promoted([parent, other, worse, clear], goal) == (None if within else clear)
    doubtful = screened(2, 'gguf(type="q4_0")', 0.80, 0.88)
    assert promoted([parent, other, worse, doubtful], goal) == doubtful


def test_only_measurements_are_shown(done: Study) -> None:
    front = done.front()
    assert front and all(t.outcome is Outcome.MEASURED for t in front)
    places = [point(values_of(t), done.goal.objectives) for t in front]
    assert not any(dominates(a, b) for a in places for b in places if a and b)
    assert all(t.value("size") <= 0.9 * formula("parent")["size"] for t in front)  # type: ignore[operator]


def test_pick_by_knee_and_by_a_metric(done: Study) -> None:
    assert done.pick() in done.front()
    recommended = next(p.trial for p in picks(done.trials, done.goal) if "recommended" in p.role)
    assert done.pick().number == recommended.number != 0
    assert done.pick(by="size").value("size") == min(t.value("size") for t in done.front())  # type: ignore[type-var]
    with pytest.raises(BudgetError, match="knee"):
        done.pick(by="beauty")
    with pytest.raises(BudgetError, match="no trial has a measured carbon"):
        done.pick(by="carbon")
    with pytest.raises(BudgetError, match=r"no trial has a measured accuracy; .*--task"):
        done.pick(Budget.parse("accuracy>=0.5"))


def test_nothing_fits_names_the_limit_to_relax(done: Study) -> None:
    with pytest.raises(Infeasible) as caught:
        done.pick(Budget.parse("size<=0.2x, kl<=0.000001"))
    error = caught.value
    assert isinstance(error, NothingFits) and error.misses
    assert error.misses == tuple(sorted(error.misses, key=lambda m: (m.worst, len(m.limits), m.trial.number)))
    if error.relaxation:
        kept = [x for x in Budget.parse("size<=0.2x, kl<=0.000001") if x != error.relaxation.limit]
        assert Budget(tuple(kept)).met(values_of(error.relaxation.trial), values_of(done.trials[0]))


def test_events_tell_the_whole_story(bare: Model, tmp_path: Path) -> None:
    seen: list[ev.Event] = []
    Study(tmp_path).run(policy(bare.path, "random", 6), runner(), {}, seen.append)
    assert isinstance(seen[0], ev.Started) and isinstance(seen[-1], ev.Ended)
    finished = [e.trial.number for e in seen if isinstance(e, ev.TrialFinished)]
    started = [e.number for e in seen if isinstance(e, ev.TrialStarted)]
    assert set(started) <= set(finished)
    paired = [t.number for e in seen if isinstance(e, ev.Paired) for t in e.trials]
    assert paired and sorted(paired) == [t.number for t in Study(tmp_path).trials if len(t.paired)]
    assert [e.front for e in seen if isinstance(e, ev.FrontChanged)]
    spent = [e.time for e in seen if isinstance(e, ev.Spent)]
    assert spent == sorted(spent) and spent[-1] == pytest.approx(spent_seconds(Study(tmp_path).trials))


def test_the_allowance_is_kept(bare: Model, tmp_path: Path) -> None:
    for seconds in (60.0, 200.0):
        study = Study(tmp_path / str(seconds)).run(policy(bare.path, "random", 999, seconds), runner(), {})
        assert 0.3 * seconds < spent_seconds(study.trials) <= seconds
        assert "left" in study.meta["ended"]


def test_more_allowance_goes_on(bare: Model, tmp_path: Path) -> None:
    first = told(Study(tmp_path).run(policy(bare.path, "random", 999, 60.0), runner(), {}).trials)
    more = told(Study(tmp_path).run(policy(bare.path, "random", 999, 200.0), runner(), {}).trials)
    assert len(more) > len(first) and [r for _, r, *_ in more[: len(first)]] == [r for _, r, *_ in first]


def test_a_last_step_that_fails_keeps_its_sentence_and_is_not_repeated(bare: Model, tmp_path: Path) -> None:
    class Dying(type(runner())):  # type: ignore[misc]
        def in_turn(self, *given: object) -> object:
            raise TimedOut("ran longer than the limit")

    study = Study(tmp_path).run(policy(bare.path, "random", 6), Dying(runner().table), SETTINGS)
    due = [p.trial for p in picks(study.trials, study.goal)]
    assert due and all(t.paired.context["outcome"] == "timed out" for t in due)
    assert all(t.paired.context["sentence"] == "ran longer than the limit" for t in due)
    assert all(t.outcome is Outcome.MEASURED and t.spent["in turn"] >= 0 for t in due)
    before = [t.to_json() for t in study.trials]
    assert [t.to_json() for t in study.run(policy(bare.path, "random", 6), runner(), SETTINGS).trials] == before


def test_a_second_process_is_busy(bare: Model, tmp_path: Path) -> None:
    child = start(bare, tmp_path, "random", 3.0)
    try:
        while child.poll() is None and not Study(tmp_path).trials:
            time.sleep(0.05)
        with pytest.raises(Busy):
            Study(tmp_path).run(policy(bare.path, "random"), runner(), {"sampler": "random"})
    finally:
        child.kill()
        child.communicate()


def test_other_settings_are_refused(bare: Model, tmp_path: Path) -> None:
    Study(tmp_path).run(policy(bare.path, "random", 3), runner(), {"workload": "chat"})
    with pytest.raises(UserError, match=r"workload 'chat'.*'batch'"):
        Study(tmp_path).run(policy(bare.path, "random", 3), runner(), {"workload": "batch"})


def test_a_parent_that_cannot_be_measured_stops_the_study(bare: Model, tmp_path: Path) -> None:
    class Broken(type(runner())):  # type: ignore[misc]
        def measure(self, recipe: Recipe, number: int, artifact: str | None, phase: Phase) -> Report:
            raise UserError("the engine does not know this model")

    with pytest.raises(UserError, match="parent itself could not be measured"):
        Study(tmp_path).run(policy(bare.path, "random", 3), Broken(runner().table), {})
    study = Study(tmp_path).run(policy(bare.path, "random", 3), runner(), {})
    assert study.trials[0].outcome is Outcome.MEASURED, "the same command tries the parent again"


def test_our_own_bugs_are_raised(bare: Model, tmp_path: Path) -> None:
    class Bug(type(runner())):  # type: ignore[misc]
        def measure(self, recipe: Recipe, number: int, artifact: str | None, phase: Phase) -> Report:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Study(tmp_path).run(policy(bare.path, "random", 3), Bug(runner().table), {})


def test_opening_nothing_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no study"):
        Study.open(tmp_path / "none")


def test_stop_is_a_step_of_the_policy(done: Study, bare: Model) -> None:
    assert isinstance(policy(bare.path, "fivefold", 25).next(done.trials), Stop)
    assert len(Measurement({})) == 0
