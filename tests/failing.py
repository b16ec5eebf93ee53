"""What the tests of failures share: a tiny model in both formats, its inputs, and the command line in two ways."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from fivefold.cli import main
from fivefold.model import ExportPlan
from fivefold.testing import tiny_model

WORDS = ["energy", "memory", "token", "second", "byte", "joule", "model", "weight", "answer", "small", "large"]

HABITS = """
import os, sys, time
job = " ".join(sys.orig_argv)
hidden = os.environ.get("HIDE", "").split(",")

class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *more):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, *more)
    def __getattr__(self, name): return getattr(self.finder, name)

if hidden != [""]:
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
if os.environ.get("HUNGRY", "nobody") in job:
    eaten = bytearray(os.urandom(1)) * 700_000_000
    time.sleep(5)
if os.environ.get("SLOW", "nobody") in job:
    time.sleep(1)
"""
"""A sitecustomize: packages that are not there, and worker processes that are hungry or slow."""


@dataclass(frozen=True)
class Inputs:
    folder: Path
    model: Path
    gguf: Path
    text: Path
    workload: Path

    def choices(self) -> list[str]:
        return ["--text", str(self.text), "--workload", str(self.workload)]

    def optimize(self, model: Path, out: Path, *more: str) -> list[str]:
        base = ["optimize", str(model), "--out", str(out), "--minimize", "latency,size", *self.choices()]
        return [*base, *(() if "--allowance" in more else ("--allowance", "1s")), *more]

    def environment(self, **more: str) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.folder / "habits"), "OMP_NUM_THREADS": "1", **more}

    def start(self, *arguments: str, limits: Callable[[], None] | None = None, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "fivefold", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=self.environment(**more), start_new_session=True, preexec_fn=limits,
        )

    def run(self, *arguments: str, limits: Callable[[], None] | None = None, **more: str) -> tuple[int, str]:
        """Exit code and standard error of the command in a process of its own."""
        child = self.start(*arguments, limits=limits, **more)
        said = child.communicate(timeout=300)[1]
        return child.returncode, said


def make_inputs(folder: Path) -> Inputs:
    from fivefold.export import export

    model = tiny_model(folder / "tiny", layers=2, width=64)
    (folder / "gguf").mkdir()
    export(model.but(export=ExportPlan(format="gguf", default="q8_0")), folder / "gguf")
    rng = random.Random(0)
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(rng.choices(WORDS, k=40)) + "." for _ in range(400)))
    workload = folder / "traffic.jsonl"
    workload.write_text(json.dumps({"prompt": "How many joules?", "max_tokens": 6}) + "\n")
    (folder / "habits").mkdir()
    (folder / "habits" / "sitecustomize.py").write_text(HABITS)
    return Inputs(folder, folder / "tiny", folder / "gguf" / "model.gguf", text, workload)


def copied(model: Path, to: Path) -> Path:
    """A copy of the model to damage: of the folder, or of the GGUF file with its neighbours."""
    shutil.copytree(model if model.is_dir() else model.parent, to)
    return to if model.is_dir() else to / model.name


def told(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str]:
    """Exit code and standard error of the command in this process."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0), capfd.readouterr().err


def one_sentence(said: str, needle: str) -> None:
    assert needle in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1 and said.startswith("fivefold: "), said
    assert ";" in said, "it does not say what to do"


def commands(out: Path) -> list[list[str]]:
    """Command lines of the living processes that work on `out`."""
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            if str(out) in " ".join(line) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(line)
        except psutil.Error:
            continue
    return found


def until(what: Callable[[], Any], child: subprocess.Popen[str] | None = None, seconds: float = 120.0) -> None:
    """Wait for `what`, at most until the child ends."""
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end and (child is None or child.poll() is None):
        time.sleep(0.05)
