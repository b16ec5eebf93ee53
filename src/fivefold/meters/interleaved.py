"""Paired comparison: several artifacts measured in turn, each in a fresh process of its own.

    with Interleaved([Job(parent, workload), Job(child, workload)], machine=machine) as pair:
        parent_m, child_m = pair.run(rounds=5)
        pair.ratio("decode", 1, 0)        # child / parent, per round, then the median with its interval

A machine's speed drifts (clocks, neighbours, caches). Taken one after the other, two artifacts would be compared on
two different machines; taken in turn within each round, the drift is in both and their ratio is steadier than either.
Order is reversed in every second round (ABBA), so a drift within rounds cancels as well. A round in which any of
them was disturbed is repeated for all. While one works, the others wait in a read and use no CPU.
"""

from __future__ import annotations

import ctypes
import json
import math
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fivefold import errors
from fivefold.machine import Machine
from fivefold.meters.money import Prices
from fivefold.meters.worker import job_to_json
from fivefold.model import Model
from fivefold.quantity import Measurement, Quantity

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
COMMAND = [sys.executable, "-m", "fivefold.meters.worker"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One arm: an exported model under a workload. `command` starts another program that speaks the protocol."""

    model: Model
    workload: Any
    label: str = ""
    command: Sequence[str] = ()


class Interleaved:
    """See the module. `timeout` is seconds for one reply of one worker (opening included).

    Raises what the worker met: a UserError or a TrialFailure (OutOfMemory, TimedOut, Crashed).
    """

    def __init__(
        self, jobs: Sequence[Job], *, machine: Machine | None = None, prices: Prices | None = None,
        country: str = "world", timeout: float = 600.0,
    ) -> None:
        self.jobs, self._timeout = list(jobs), timeout
        self._machine, self._prices, self._country = machine, prices, country
        self._workers: list[_Worker] = []
        self.rounds: list[list[dict[str, Any]]] = []
        self.kept: list[int] = []

    def __enter__(self) -> Self:
        machine, prices = self._machine or Machine.load(), self._prices or Prices.load()
        self._folder = tempfile.TemporaryDirectory(prefix="fivefold-")
        try:
            for i, job in enumerate(self.jobs):
                file = Path(self._folder.name) / f"{i}.json"
                file.write_text(json.dumps(job_to_json(job.model, job.workload, machine, prices, self._country)))
                worker = _Worker(job.command or COMMAND, file, job.label or job.model.name, self._timeout)
                self._workers.append(worker)
                worker.reply()  # one opens after the other
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def run(self, rounds: int = 5, patience: float = math.inf) -> list[Measurement]:
        """Measurements in the order of the jobs; the workers end. After `patience` seconds no third round is begun."""
        least, end = min(2, rounds), time.monotonic() + patience
        while len(self.rounds) < 2 * rounds and sum(not _disturbed(r) for r in self.rounds) < rounds:
            if len(self.rounds) >= least and time.monotonic() > end:
                break
            self.rounds.append(self._round(backwards=len(self.rounds) % 2 == 1))
        self.kept = keep(self.rounds, rounds)
        return [
            Measurement.from_json(w.ask({"do": "finish", "keep": self.kept})["measurement"]) for w in self._workers
        ]

    def ratio(self, metric: str, a: int, b: int) -> Quantity:
        """Median over the kept rounds of metric(a) / metric(b): ttft, latency, decode, ..., or energy."""
        pairs = [(_value(r[a], metric), _value(r[b], metric)) for i, r in enumerate(self.rounds) if i in self.kept]
        ratios = [x / y for x, y in pairs if x is not None and y]
        if not ratios:
            return Quantity.missing("1", f"no round has {metric} of both")
        return Quantity.median_of(ratios, "1")

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        self._folder.cleanup()

    def _round(self, *, backwards: bool) -> list[dict[str, Any]]:
        order = list(range(len(self._workers)))
        done = {i: self._workers[i].ask({"do": "round"}) for i in (reversed(order) if backwards else order)}
        return [done[i] for i in order]


def keep(rounds: Sequence[Sequence[dict[str, Any]]], wanted: int) -> list[int]:
    """Indices of the undisturbed rounds, filled up with the least disturbed, in time order."""
    quiet = [i for i, r in enumerate(rounds) if not _disturbed(r)][:wanted]
    noisy = sorted((i for i, r in enumerate(rounds) if _disturbed(r)), key=lambda i: _worst(rounds[i]))
    return sorted(quiet + noisy[: wanted - len(quiet)])


class _Worker:
    def __init__(self, command: Sequence[str], job: Path, label: str, timeout: float) -> None:
        self._label, self._timeout = label, timeout
        self._errors = job.with_suffix(".log").open("w+b")
        self._process = subprocess.Popen(
            [*command, str(job)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, preexec_fn=with_parent if _LIBC else None,
        )

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._crashed() from None
        return self.reply()

    def reply(self) -> dict[str, Any]:
        assert self._process.stdout
        if not _readable(self._process.stdout, self._timeout):
            self._process.kill()
            raise errors.TimedOut(f"{self._label}: no answer within {self._timeout:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._crashed()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = getattr(errors, answer["kind"], errors.Crashed)
            error: errors.FivefoldError = errors.FivefoldError.__new__(kind)
            error.args = (f"{self._label}: {answer['error']}",)
            raise error
        return answer

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _crashed(self) -> errors.Crashed:
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:] or ["nothing was printed"]
        return errors.Crashed(f"{self._label}: the measuring process ended with code {code} ({last[0][:200]})")


def with_parent() -> None:
    """In a child, before its program starts: die when the parent dies (Linux; elsewhere nothing)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _readable(stream: Any, timeout: float) -> bool:
    """Wait for a line. On Windows pipes cannot be waited for, so the read itself blocks."""
    if sys.platform == "win32":
        return True
    return bool(select.select([stream], [], [], timeout)[0])


def _disturbed(turn: Sequence[dict[str, Any]]) -> bool:
    return any(arm["disturbed"] for arm in turn)


def _worst(turn: Sequence[dict[str, Any]]) -> float:
    return max(arm["others"] for arm in turn)


def _value(arm: dict[str, Any], metric: str) -> float | None:
    value = arm["energy"]["value"] if metric == "energy" else arm["values"].get(metric)
    return None if value is None else float(value)
