"""Real child processes: a memory cap, a time limit, a crash, typed errors, and no orphan."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fivefold.errors import Crashed, Misfit, NotFinite, OutOfMemory, TimedOut
from fivefold.quantity import Measurement, Quantity
from fivefold.study.driver import answer, tree_memory, watched
from fivefold.study.worker import finite


def run(tmp_path: Path, code: str, memory: int = 1 << 33, seconds: float = 60.0) -> tuple[int, list[str]]:
    phases: list[str] = []
    command = [sys.executable, "-c", code]
    status = watched(command, tmp_path / "log", tmp_path / "phase", phases.append, memory=memory, seconds=seconds)
    return status, phases


def gone(pid: int) -> bool:
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_the_memory_cap_ends_the_child(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match="more than the cap of 150 MB"):
        run(tmp_path, "x = bytearray(600_000_000)\nimport time; time.sleep(60)", memory=150_000_000)


def test_memory_of_grandchildren_counts(tmp_path: Path) -> None:
    inner = "x = bytearray(600_000_000); import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with pytest.raises(OutOfMemory):
        run(tmp_path, code, memory=150_000_000)


def test_the_time_limit_ends_the_child_and_its_children(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    code = (
        "import os, subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(note)!r}, 'w').write(f'{{os.getpid()}} {{p.pid}}')\n"
        "time.sleep(60)"
    )
    with pytest.raises(TimedOut, match="limit of 2 s"):
        run(tmp_path, code, seconds=2.0)
    assert all(gone(int(pid)) for pid in note.read_text().split())


def test_what_a_finished_child_left_behind_is_ended_too(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = (
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(note)!r}, 'w').write(str(p.pid))"
    )
    assert run(tmp_path, code)[0] == 0
    assert gone(int(note.read_text()))


def test_phases_are_passed_on(tmp_path: Path) -> None:
    phase = str(tmp_path / "phase")
    code = f"import time\nfor p in ('build', 'screen'):\n    open({phase!r}, 'w').write(p); time.sleep(0.6)"
    status, phases = run(tmp_path, code)
    assert status == 0 and [p for p in phases if p] == ["build", "screen"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children with their parent on Linux only")
def test_a_killed_driver_takes_its_child_along(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    driver = (
        "import sys; from pathlib import Path; from fivefold.study.driver import watched\n"
        f"watched([sys.executable, '-c', {child!r}], Path({str(tmp_path / 'log')!r}), Path({str(tmp_path / 'p')!r}),"
        " print, memory=1 << 33, seconds=60)"
    )
    process = subprocess.Popen([sys.executable, "-c", driver])
    while not note.is_file() or not note.read_text():
        time.sleep(0.05)
    pid = int(note.read_text())
    assert psutil.pid_exists(pid)
    process.kill()
    process.wait()
    assert gone(pid)


def test_ctrl_c_ends_the_child(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    driver = (
        "import sys; from pathlib import Path; from fivefold.study.driver import watched\n"
        f"watched([sys.executable, '-c', {child!r}], Path({str(tmp_path / 'log')!r}), Path({str(tmp_path / 'p')!r}),"
        " print, memory=1 << 33, seconds=60)"
    )
    process = subprocess.Popen([sys.executable, "-c", driver], stderr=subprocess.DEVNULL)
    while not note.is_file() or not note.read_text():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.wait(30)
    assert gone(int(note.read_text()))


def test_no_result_is_a_crash_with_the_last_words(tmp_path: Path) -> None:
    run(tmp_path, "import sys; print('first', file=sys.stderr); sys.exit('it broke')")
    with pytest.raises(Crashed, match="it broke"):
        answer(tmp_path / "result", tmp_path / "log")


def test_a_signal_without_words_is_a_crash_too(tmp_path: Path) -> None:
    status, _ = run(tmp_path, "import os; os.abort()")
    assert status != 0
    with pytest.raises(Crashed, match="it said nothing"):
        answer(tmp_path / "result", tmp_path / "log")


@pytest.mark.parametrize(("kind", "expected"), [("Misfit", Misfit), ("NotFinite", NotFinite), ("Nonsense", Crashed)])
def test_errors_keep_their_type_and_what_they_cost(tmp_path: Path, kind: str, expected: type[Exception]) -> None:
    data = {"error": "one sentence", "kind": kind, "spent": {"build": 2.0}}
    (tmp_path / "result").write_text(json.dumps(data))
    with pytest.raises(expected, match="one sentence") as caught:
        answer(tmp_path / "result", tmp_path / "log")
    assert caught.value.spent == {"build": 2.0}  # type: ignore[attr-defined]


def test_numbers_that_are_none_are_not_finite_errors() -> None:
    good = Measurement({"kl": Quantity(value=1.0, unit="nat/token", method="measured"),
                        "mfu": Quantity.missing("fraction", "no rate")})
    assert finite(good) is good
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NotFinite, match="kl"):
            finite(Measurement({"kl": Quantity(value=bad, unit="nat/token", method="measured")}))


def test_memory_of_a_process_that_is_gone_is_nothing() -> None:
    assert tree_memory(2**22 + 1) == 0 < tree_memory(os.getpid())
