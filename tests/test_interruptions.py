"""The real command, killed, interrupted, started twice, or given too little memory: what is on record stays."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from failing import Inputs, commands, make_inputs, one_sentence, until
from fivefold.model import load
from fivefold.study.picks import picks
from fivefold.study.policy import spent_seconds
from fivefold.study.study import Study
from fivefold.study.trial import Outcome

KILLS = 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("interrupted"))


def recipes(out: Path) -> list[str]:
    return [t.recipe for t in Study(out).trials]


def no_orphan(out: Path) -> None:
    until(lambda: not commands(out), seconds=10)
    assert not commands(out)


def working(out: Path, job: str = "") -> bool:
    return any("fivefold.study.worker" in line and job in line for line in map(" ".join, commands(out)))


def is_whole(out: Path) -> None:
    with closing(sqlite3.connect(out / "study.sqlite")) as base:
        assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def undisturbed(inputs: Inputs, recipes: list[str]) -> list[str]:
    """The first recipes of a study by the random sampler that nothing disturbs: each follows from those before it."""
    from fivefold.budget import Allowance, Budget
    from fivefold.study.optimize import setup

    policy = setup(
        load(inputs.gguf), budget=Budget(), objectives=("size", "kl"), allowance=Allowance(), sampler="random",
        workload=str(inputs.workload), text=str(inputs.text),
    ).policy
    found = ["parent"]
    while len(found) < len(recipes):
        recipe = policy.space.draw(random.Random(f"0:{len(found)}:0"), set(found))
        found.append(str(recipe))
    return found


linux = pytest.mark.skipif(
    sys.platform != "linux", reason="the kernel ends children with their parent on Linux only"
)


@linux
def test_killed_at_random_moments_the_same_command_finishes(inputs: Inputs, tmp_path: Path) -> None:
    out, rng, known = tmp_path / "out", random.Random(0), list[str]()
    base = ["optimize", str(inputs.gguf), "--out", str(out), "--minimize", "size,kl", "--sampler", "random",
            *inputs.choices()]
    for number in range(KILLS):
        child = inputs.start(*base, "--allowance", "1h")
        if number % 2:
            until(lambda: working(out), child)
        else:
            before = len(known)
            until(lambda before=before: len(recipes(out)) > before, child)  # type: ignore[misc]
        time.sleep(rng.random() * 1.2)
        assert child.poll() is None, "it ended by itself, so this was no kill"
        child.kill()
        child.communicate()
        no_orphan(out)
        if (out / "study.sqlite").is_file():
            is_whole(out)
        assert recipes(out)[: len(known)] == known, "a trial on record was lost"
        known = recipes(out)
    assert len(known) >= KILLS // 2 and known == undisturbed(inputs, known)
    for place in (out, out / "jobs"):
        (place / ".reference-full.npz.killed.partial").write_bytes(b"half of it")
    spent = spent_seconds(Study(out).trials)
    code, said = inputs.run(*base, "--allowance", f"{spent + 10:.0f}s")
    assert (code, said) == (0, "")
    assert recipes(out)[: len(known)] == known
    assert Study.open(out).parent is not None and (out / "report.html").is_file()
    is_whole(out)
    no_orphan(out)
    assert not list(out.rglob("*.partial"))
    hidden = {p.name for p in out.rglob(".*")}
    assert hidden <= {".locks"}, "a half-made folder was left"


STUDY = """
import sys
from fivefold.budget import Allowance, Budget
from fivefold.model import load
from fivefold.recipe import catalogue
from fivefold.study.optimize import optimize

model, out, text, workload = sys.argv[1:]
optimize(load(model), out, budget=Budget(), objectives=("size", "kl"), allowance=Allowance(), trials=3, rounds=1,
         techniques={"gguf": catalogue()["gguf"]}, text=text, workload=workload)
"""


def descendants(mark: str) -> list[int]:
    """Living processes that were started with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@linux
def test_killed_while_the_picks_are_measured_in_turn(inputs: Inputs, tmp_path: Path) -> None:
    out, rng = tmp_path / "out", random.Random(1)
    command = [sys.executable, "-c", STUDY, str(inputs.model), str(out), str(inputs.text), str(inputs.workload)]
    known: list[dict[str, object]] = []
    for number in range(3):
        mark = f"{out}-{number}"
        slow = {"SLOW": "meters.worker", "MARK": mark}
        child = subprocess.Popen(command, env=inputs.environment(**slow), text=True, start_new_session=True)
        until(lambda: working(out, "in-turn"), child)
        time.sleep(rng.random() * 1.5)
        assert child.poll() is None, "it ended by itself, so this was no kill"
        child.kill()
        child.communicate()
        until(lambda mark=mark: not descendants(mark), seconds=10)  # type: ignore[misc]
        assert not descendants(mark), "a measuring process was left behind"
        now = [t.to_json() for t in Study(out).trials]
        assert not known or now == known, "the records changed"
        known = now
    assert subprocess.run(command, env=inputs.environment(), stdout=subprocess.PIPE).returncode == 0
    study = Study.open(out)
    chosen = [p.trial for p in picks(study.trials, study.goal)]
    assert chosen and all(t.paired.value("latency") for t in chosen)
    for before, trial in zip(known, study.trials, strict=True):
        after = trial.to_json()
        assert {k: v for k, v in after.items() if k not in ("paired", "spent")} == {
            k: v for k, v in before.items() if k not in ("paired", "spent")
        }
    no_orphan(out)


def test_ctrl_c_stops_and_says_how_to_go_on(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = inputs.start(*inputs.optimize(inputs.gguf, out, "--allowance", "10min"), SLOW="trial-1-measure")
    until(lambda: len(recipes(out)) > 0, child)
    until(lambda: working(out, "trial-1-measure"), child)
    os.killpg(child.pid, signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.strip() == "fivefold: stopped; nothing is lost, the same command goes on"
    no_orphan(out)
    assert recipes(out)[0] == "parent"
    is_whole(out)


def test_ctrl_c_while_measuring(inputs: Inputs) -> None:
    child = inputs.start("measure", str(inputs.gguf), *inputs.choices(), "--rounds", "1000", SLOW="meters.worker")
    until(lambda: bool(psutil.Process(child.pid).children()), child)
    time.sleep(1)
    os.killpg(child.pid, signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in said


def test_a_second_process_is_refused_and_the_first_unharmed(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = inputs.optimize(inputs.gguf, out, "--allowance", "4s")
    first = inputs.start(*command, SLOW="fivefold.study.worker")
    until(lambda: working(out), first)
    code, said = inputs.run(*command)
    assert first.poll() is None, "the first was too fast for this test"
    assert code == 2
    one_sentence(said, "another process is working on the study")
    assert first.communicate(timeout=120)[1] == ""
    assert first.returncode == 0
    is_whole(out)


def test_a_trial_that_eats_the_memory_is_a_result(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = inputs.optimize(inputs.gguf, out, "--allowance", "25s", "--memory", "500MB")
    code, said = inputs.run(*command, HUNGRY="trial-1-")
    assert (code, said) == (0, "")
    trials = Study.open(out).trials
    assert trials[1].outcome is Outcome.OUT_OF_MEMORY and "more than the cap of 500 MB" in trials[1].sentence
    assert trials[0].outcome is Outcome.MEASURED and len(trials) > 2
    assert not any(t.outcome is Outcome.OUT_OF_MEMORY for t in trials[2:])


def test_a_parent_that_does_not_fit_is_one_sentence(inputs: Inputs, tmp_path: Path) -> None:
    code, said = inputs.run(*inputs.optimize(inputs.model, tmp_path / "out", "--memory", "100MB"))
    assert code == 2
    one_sentence(said, "more than the cap of 100 MB")
    code, said = inputs.run(*inputs.optimize(inputs.model, tmp_path / "out", "--memory", "8GB"))
    assert (code, said) == (0, ""), "with more memory the same study goes on"
