"""Distillation of a student with half the layers: what each objective wins back in the same time.

    python benchmarks/distill.py [--layers 15] [--minutes 5] [--long 30] [--windows 8] [--keep runs/distill]

SmolLM2-135M (the off-grid parent) loses `--layers` of its 30 layers, then learns from the parent by each way within
`--minutes`; the first way also within `--long`. Held-out text is encyclopedia leads that no calibration reads; loss, KL
and agreement are against the parent in float32, in the torch engine. "Recovered" is the share of the lost agreement
that came back. Each way runs in a process of its own, whose peak memory is shown; processor time counts all threads.
Killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _common import interval, number, publish, table

from fivefold import bundled
from fivefold.engines import open_session
from fivefold.export import export
from fivefold.model import Model, model_from_json, model_to_json
from fivefold.quantity import Measurement, Quantity
from fivefold.recipe import Recipe, Technique, make
from fivefold.tasks.fidelity import Reference, fidelity
from fivefold.tasks.text import windows
from fivefold.tokenizer import Tokenizer

MODEL, WINDOW = "smollm2-135m", 512
MOST = 1_000_000
WAYS: dict[str, dict[str, Any]] = {
    "forward_kl": {"objective": "forward_kl"},
    "reverse_kl": {"objective": "reverse_kl"},
    "skew_kl": {"objective": "skew_kl"},
    "jsd": {"objective": "jsd", "mix": 0.5},
    "features": {"objective": "forward_kl", "features": 1.0},
    "on_policy": {"objective": "reverse_kl", "on_policy": 0.5, "teacher_mix": 0.2},
    "distill_text": {"learn": "answer"},
    "distill_text, all": {"learn": "all"},
}
LONG = "forward_kl, long"


def technique(name: str, given: argparse.Namespace) -> Technique:
    told = {"minutes": given.long if name == LONG else given.minutes, "steps": given.steps or MOST}
    way = WAYS["forward_kl" if name == LONG else name]
    if "learn" not in way:
        return make("distill", {**told, **way})
    return make("distill_text", {**told, **way, **({"texts": MOST} if told["minutes"] else {})})


def student(given: argparse.Namespace) -> Model:
    """The parent with fewer layers, made once."""
    folder: Path = given.keep / f"student-{given.layers}"
    file = folder / "model.json"
    if not file.is_file():
        made = Recipe.parse(f"prune_depth(layers={given.layers})").apply(bundled.load(MODEL).but(work=folder))
        file.write_text(json.dumps(model_to_json(made)), encoding="utf-8")
    return model_from_json(json.loads(file.read_text(encoding="utf-8")))


def judged(model: Model, folder: Path, given: argparse.Namespace) -> Measurement:
    file = given.keep / f"reference-{given.windows}.npz"
    if not file.is_file():
        parent = bundled.load(MODEL)
        text = windows(Tokenizer(parent.tokenizer_file), "encyclopedia", "evaluation", given.windows * WINDOW, WINDOW)
        session = open_session(parent)
        Reference.record(session, text).save(file)
        session.close()
    folder.mkdir(parents=True, exist_ok=True)
    session = open_session(export(model, folder))
    try:
        return fidelity(session, Reference.load(file)).measurement
    finally:
        session.close()


def one(name: str, given: argparse.Namespace) -> dict[str, Any]:
    model, work = student(given), given.keep / "work" / name.replace(", ", "-")
    if name == "cut":
        return {"name": name, "quality": judged(model, work / "out", given).to_json(), "said": model.coverage[-1]}
    begun, spent = time.monotonic(), time.process_time()
    done = technique(name, given).apply(model.but(work=work / str(time.time_ns())))
    took = {"seconds": time.monotonic() - begun, "processor": time.process_time() - spent,
            "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    return {"name": name, **took, "quality": judged(done, work / "out", given).to_json(), "said": done.coverage[-1]}


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own; kept."""
    told = [given.minutes, given.long if name == LONG else 0, given.steps, given.windows, given.layers]
    file: Path = given.keep / f"{name.replace(', ', '-')}-{'-'.join(f'{t:g}' for t in told)}.json"
    if not file.is_file():
        print(f"{name} ...", flush=True)
        done = subprocess.run([sys.executable, *sys.argv, "--one", name], check=True, capture_output=True, text=True)
        file.write_text(done.stdout.splitlines()[-1], encoding="utf-8")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def row(found: dict[str, Any], cut: float) -> list[str]:
    quality = {name: Quantity.from_json(q) for name, q in found["quality"]["quantities"].items()}
    back = ((quality["agreement"].value or 0) - cut) / (1 - cut)
    tokens = re.search(r"\((\d+) tokens,", found["said"])
    return [found["name"], interval(quality["agreement"], 3), number(100 * back, 1), interval(quality["kl"], 3),
            number(quality["loss"].value, 3),
            f"{int(tokens[1]):,}" if tokens else "-", number(found.get("seconds"), 0),
            number(found.get("processor"), 0), number(found.get("peak", 0) / 1e9 or None)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--layers", type=int, default=15, help="layers removed")
    options.add_argument("--minutes", type=float, default=5.0, help="allowance of each way")
    options.add_argument("--long", type=float, default=30.0, help="a longer allowance, for the first way; 0 for none")
    options.add_argument("--steps", type=int, default=0, help="at most so many steps, whatever time is left")
    options.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens")
    options.add_argument("--only", default="", help="some of the ways, by name, separated by ;")
    options.add_argument("--keep", type=Path, default=Path("runs/distill"))
    options.add_argument("--one", default="", help=argparse.SUPPRESS)
    options.add_argument("--quick", action="store_true", help="write no fragment")
    given = options.parse_args()
    given.keep = given.keep.resolve()
    given.keep.mkdir(parents=True, exist_ok=True)
    if given.one:
        print(json.dumps(one(given.one, given)))
        return
    names = [n.strip() for n in given.only.split(";") if n.strip()] or [*WAYS, *([LONG] if given.long else [])]
    cut, *rest = [measured(name, given) for name in ("cut", *names)]
    before = Quantity.from_json(cut["quality"]["quantities"]["agreement"]).value or 0.0
    heads = ["way", "agreement", "recovered %", "KL, nats", "loss", "tokens", "seconds", "processor s", "peak GB"]
    said = "\n".join(f"- {found['name']}: {found['said']}" for found in (cut, *rest))
    what = (f"{given.layers} of 30 layers of SmolLM2-135M removed, then {given.minutes:g} minutes of learning from the"
            f" parent; {given.windows * WINDOW} evaluation tokens, 95 % intervals.")
    body = f"{what}\n\n{table(heads, [row(found, before) for found in (cut, *rest)])}\n\n{said}"
    publish("distill", "Distillation of half the depth", body, packages=("torch",), keep=not given.quick)


if __name__ == "__main__":
    main()
