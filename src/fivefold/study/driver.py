"""Driver: runs each phase of a trial in a fresh process and watches over it.

The child gets a process group of its own. While it runs, its resident memory is read ten times a second, that of its
whole tree twice: above the cap the group is killed and the trial is out of memory; past the time limit it has timed
out. A child that ends without a result has crashed, and its last line on standard error is kept. On Ctrl-C, and when
the driver itself is stopped, the group is killed; a driver that is killed outright takes its child along on Linux
(PR_SET_PDEATHSIG). No orphan is left.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from fivefold import errors
from fivefold.errors import Crashed, OutOfMemory, TimedOut
from fivefold.files import sweep, write_text
from fivefold.machine import Machine, usable_ram
from fivefold.meters.interleaved import with_parent
from fivefold.model import Model, model_to_json
from fivefold.quantity import Measurement, Quantity
from fivefold.recipe import Recipe
from fivefold.study import quality
from fivefold.study.in_turn import Turn
from fivefold.study.trial import Trial
from fivefold.tasks.choice import ChoiceSet

POLL = 0.1
FAMILY_EVERY = 5
LIMIT_SECONDS = 1800.0
SCREEN_TOKENS, FULL_TOKENS, WINDOW = 384, 2048, 512

_NONE = Measurement({})


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one phase brought. `spent` is seconds by phase; names with a dot are details or other units."""

    screen: Measurement = _NONE
    measurement: Measurement = _NONE
    made: Mapping[str, Quantity] = field(default_factory=dict)
    spent: Mapping[str, float] = field(default_factory=dict)
    coverage: tuple[str, ...] = ()
    artifact: str | None = None


Phase = Callable[[str], None]


class Runner(Protocol):
    """Runs the phases of trials. Raises TrialFailure or UserError; an attribute `spent` may carry what it cost."""

    def prepare(self) -> Mapping[str, float]:
        """What is needed once before the first trial, its seconds by phase; called again after a kill."""
        ...

    def build(self, recipe: Recipe, number: int, phase: Phase) -> Report: ...

    def measure(self, recipe: Recipe, number: int, artifact: str | None, phase: Phase) -> Report: ...

    def in_turn(
        self, parent: Trial, trials: Sequence[Trial], turn: Turn, patience: float, phase: Phase
    ) -> tuple[Mapping[int, Measurement], Mapping[str, float]]:
        """(number -> ratios to the parent, what it cost). `patience` in seconds: then no third round is begun."""
        ...


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The real runner. `memory` is a cap in bytes, `seconds` a limit per phase, `quota` bytes for artifacts.

    `questions` are the tasks by which trials are judged beside fidelity.
    """

    folder: Path
    model: Model
    machine: Machine
    workload: Any
    windows: Callable[[str, int], list[list[int]]]
    prices: Any
    country: str = "world"
    seed: int = 0
    rounds: int = 5
    patience: float = math.inf
    memory: int | None = None
    seconds: float = LIMIT_SECONDS
    quota: int | None = None
    questions: Sequence[ChoiceSet] = ()

    def prepare(self) -> Mapping[str, float]:
        for folder in (self.folder, self.folder / "jobs"):
            sweep(folder)
        needed = [f"reference-{size}.npz" for size in ("screen", "full")] + [quality.ANSWERS] * bool(self.questions)
        if all((self.folder / name).is_file() for name in needed):
            return {}
        quality.keep(self.folder, self.questions)
        windows = {"screen": self.windows("screen", SCREEN_TOKENS), "full": self.windows("evaluation", FULL_TOKENS)}
        spent = self._run({"do": "reference", "windows": windows}, "reference", lambda _: None)["spent"]
        return {name: spent[name] for name in ("reference", "quality") if name in spent}

    def build(self, recipe: Recipe, number: int, phase: Phase) -> Report:
        if not recipe.techniques:
            return Report()  # the parent is built already and would be screened against itself
        return _report(self._run({"do": "build", "recipe": str(recipe)}, f"trial-{number}-build", phase))

    def measure(self, recipe: Recipe, number: int, artifact: str | None, phase: Phase) -> Report:
        job = {
            "do": "measure", "recipe": str(recipe), "artifact": artifact, "rounds": self.rounds,
            "patience": min(self.patience, self.seconds),
        }
        return _report(self._run(job, f"trial-{number}-measure", phase))

    def in_turn(
        self, parent: Trial, trials: Sequence[Trial], turn: Turn, patience: float, phase: Phase
    ) -> tuple[Mapping[int, Measurement], Mapping[str, float]]:
        room = min(usable_ram(), (self.memory or usable_ram()) * (1 + len(trials)))
        job = {
            "do": "in turn", "requests": turn.requests, "rounds": turn.rounds, "patience": patience, "room": room,
            "arms": [{"number": t.number, "recipe": t.recipe, "artifact": t.artifact} for t in trials],
            "sizes": {str(t.number): t.value("memory") for t in (parent, *trials)},
        }
        done = self._run(job, "in-turn", phase, room)
        return {int(n): Measurement.from_json(m) for n, m in done["paired"].items()}, done["spent"]

    def _run(self, job: Mapping[str, Any], name: str, phase: Phase, memory: int | None = None) -> dict[str, Any]:
        from fivefold.meters.worker import PlainWorkload

        jobs = self.folder / "jobs"
        progress, result = jobs / f"{name}.phase", jobs / f"{name}.result.json"
        whole = {
            **job, "model": model_to_json(self.model), "machine": self.machine.to_json(), "folder": str(self.folder),
            "workload": asdict(PlainWorkload.of(self.workload)), "prices": self.prices.to_json(),
            "country": self.country, "quota": self.quota, "seed": self.seed,
            "progress": str(progress), "result": str(result),
        }
        result.unlink(missing_ok=True)
        write_text(jobs / f"{name}.json", json.dumps(whole))
        command = [sys.executable, "-m", "fivefold.study.worker", str(jobs / f"{name}.json")]
        cap = memory or self.memory or usable_ram()
        watched(command, jobs / f"{name}.log", progress, phase, memory=cap, seconds=self.seconds)
        return answer(result, jobs / f"{name}.log")


def watched(
    command: list[str], log: Path, progress: Path, phase: Phase, *, memory: int, seconds: float,
    poll: float = POLL,
) -> int:
    """Run `command` to its end under a memory cap and a time limit; its exit code.

    `phase` is called with the content of `progress` whenever that changes. Raises OutOfMemory or TimedOut after the
    whole group was killed.
    """
    start, shown, looks = time.monotonic(), "", 0
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, preexec_fn=with_parent
        )
        try:
            while True:
                try:
                    return child.wait(poll)
                except subprocess.TimeoutExpired:
                    pass
                now = progress.read_text(encoding="utf-8") if progress.is_file() else ""
                if now != shown:
                    shown = now
                    phase(now)
                used = tree_memory(child.pid, family=looks % FAMILY_EVERY == 0)
                looks += 1
                if used > memory:
                    raise OutOfMemory(f"used {used / 1e6:.0f} MB, more than the cap of {memory / 1e6:.0f} MB")
                if time.monotonic() - start > seconds:
                    raise TimedOut(f"ran longer than the limit of {seconds:.0f} s, in phase {shown or 'start'}")
        finally:
            kill_group(child)
            progress.unlink(missing_ok=True)


def tree_memory(pid: int, family: bool = True) -> int:
    """Resident bytes of a process and, if `family`, its descendants (finding these costs milliseconds)."""
    total = 0
    try:
        process = psutil.Process(pid)
        members = [process, *(process.children(recursive=True) if family else ())]
    except psutil.Error:
        return 0
    for member in members:
        try:
            total += int(member.memory_info().rss)
        except psutil.Error:
            continue
    return total


def kill_group(child: subprocess.Popen[bytes]) -> None:
    """End the child's whole group, also when the child itself has ended and left others behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def answer(result: Path, log: Path) -> dict[str, Any]:
    """The worker's result. Raises the typed error it reports, or Crashed with its last line on standard error."""
    try:
        data: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip()[:300] if lines else "it said nothing"
        raise Crashed(f"the process ended without a result: {last}") from None
    if "error" in data:
        kind = getattr(errors, data["kind"], Crashed)
        error = Exception.__new__(kind)
        Exception.__init__(error, data["error"])
        error.spent = data.get("spent", {})
        raise error
    return data


def _report(data: Mapping[str, Any]) -> Report:
    def measurement(name: str) -> Measurement:
        return Measurement.from_json(data[name]) if name in data else Measurement({})

    return Report(
        screen=measurement("screen"), measurement=measurement("measurement"),
        made={name: Quantity.from_json(q) for name, q in data.get("made", {}).items()}, spent=data["spent"],
        coverage=tuple(data.get("coverage", ())), artifact=data.get("artifact"),
    )
