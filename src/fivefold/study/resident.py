"""Resident: what a training process holds besides the numbers that formulas count.

    process = what it holds before training + what a rehearsal of training added to a process like it

    entered = the same, at the moment the weights were read

Libraries imported on the way, prepared kernels, threads and the allocator's own needs are a hundred megabytes or more;
they depend on versions and not on the model. So a model of two small layers is trained for a few steps in a process of
its own, and what that process took is remembered in the cache folder. Ways of training whose adaptation imports the
same `libraries` share one rehearsal.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fivefold.artifact import key, versions
from fivefold.errors import Crashed
from fivefold.files import write_text
from fivefold.machine import Machine
from fivefold.meters.memory import PeakMemory
from fivefold.paths import cache_dir
from fivefold.recipe import Recipe
from fivefold.study.build import shared_code
from fivefold.training.method import Adaptation

STEPS, TOKENS = 3, 1024
SECONDS = 600.0
_LIBRARIES = ("fivefold", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy")


def now() -> int:
    """Bytes this process holds with what every run imports, memory that was freed given back."""
    import psutil
    import transformers.models.auto.modeling_auto  # noqa: F401

    from fivefold.training.module import give_back

    give_back()
    return int(psutil.Process().memory_info().rss)


@dataclass(frozen=True)
class Added:
    """Bytes that training adds to a process, its numbers left out: until the weights are read, and at its peak."""

    entered: float
    peak: float


def added(recipe: str, machine: Machine, hear: Callable[[str], None] = lambda sentence: None) -> Added:
    """What training by `recipe` adds; rehearsed once, then remembered. Raises Crashed when the rehearsal fails."""
    decides = {"recipe": recipe, "versions": versions(*_LIBRARIES), "python": sys.version, "machine": machine.id,
               "code": shared_code()}
    note = cache_dir() / "rehearsals" / f"{key(decides)}.json"
    try:
        told = json.loads(note.read_text(encoding="utf-8"))
        return Added(float(told["entered"]), float(told["peak"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    hear(f"rehearsing {recipe} on a tiny model, once: how much memory do the libraries take?")
    with tempfile.TemporaryDirectory(prefix="fivefold.") as folder:
        _child("make", folder, recipe)
        told = json.loads(_child("rehearse", folder, recipe))
    write_text(note, json.dumps({**told, **decides}) + "\n")
    return Added(float(told["entered"]), float(told["peak"]))


def rehearsed(libraries: Sequence[str]) -> str:
    """The way by which an adaptation that imports `libraries` is rehearsed: the first that imports the same."""
    from fivefold.study.forecast import ways

    for recipe in ways():
        adaptation = next((t for t in recipe if isinstance(t, Adaptation)), None)
        if adaptation is not None and tuple(adaptation.libraries) == tuple(libraries):
            return str(recipe)
    raise ValueError(f"no adaptation imports {libraries}")


def _child(what: str, folder: str, recipe: str) -> str:
    command = [sys.executable, "-m", __name__, what, folder, recipe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Crashed(f"the rehearsal of {recipe} took more than {SECONDS:.0f} s; try again on a quiet machine"
                      ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Crashed(f"the rehearsal of {recipe} failed ({last[:200]}); free memory and try again")
    return done.stdout.strip().rpartition("\n")[2]


def make(folder: Path) -> None:
    from fivefold.testing.tiny import tiny_examples, tiny_model

    tiny_model(folder / "model", layers=2)
    tiny_examples(folder / "rows.jsonl")


def rehearse(folder: Path, recipe: str) -> Added:
    """Train the model in `folder`; for a process of its own."""
    from fivefold.model import load
    from fivefold.training.checkpoint import Keeper
    from fivefold.training.run import examples_of, run

    model = load(folder / "model")
    plan = replace(model.train, data=folder / "rows.jsonl", steps=STEPS, tokens_per_step=TOKENS, at_once=TOKENS)
    ready = Recipe.parse(recipe).plan(model.but(train=plan))
    parts = examples_of(ready)
    (folder / "run").mkdir()
    before, marks = now(), []
    with PeakMemory() as window:
        run(ready, folder / "run", parts=parts, keeper=Keeper(folder / "run", "rehearsal", 0.0),
            planned=lambda plan: marks.append(window.so_far()))
    return Added(marks[0] - before, (window.peak.value or 0.0) - before)


def main(arguments: Sequence[str]) -> None:
    what, folder, recipe = arguments
    if what == "make":
        make(Path(folder))
    else:
        print(json.dumps(asdict(rehearse(Path(folder), recipe))))


if __name__ == "__main__":
    main(sys.argv[1:])
