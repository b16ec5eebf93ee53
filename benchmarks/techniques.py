"""The measured record: every technique of inference with and without, on SmolLM2-135M, in the engine that serves it.

    python benchmarks/techniques.py [--only wanda,gptq] [--keep runs/techniques] [--rounds 4] [--quality]

"Without" is the same recipe with the technique left out; where nothing is left, the parent in the torch engine (in
bfloat16 or float32, which this machine multiplies faster) or as llama.cpp's F16, whichever the technique is served by.
Both are built, then measured in turn under the chat workload, each in a fresh process; ratios are with / without,
medians over rounds. KL and agreement are against the parent in float32 on 2,048 held-out tokens. What a paper reports
for its own models and machines stands beside it: a record that does not reach it is a result. Agreement and KL also go
to src/fivefold/study/records.json, from which the search takes its first guess of what a technique costs in quality.
Each technique is built in a process of its own: `to make` is its time and that process's peak memory. Killed, the same
command goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from _common import attempt, interval, number, of_inference, publish, table

import fivefold.study
from fivefold import bundled
from fivefold.engines import open_session
from fivefold.files import write_text
from fivefold.machine import Machine
from fivefold.meters.interleaved import Interleaved, Job
from fivefold.meters.memory import PeakMemory
from fivefold.model import Model
from fivefold.quantity import Quantity
from fivefold.recipe import Recipe, catalogue
from fivefold.study.build import Builder, Built
from fivefold.study.in_turn import spread
from fivefold.study.predictor import Predictor
from fivefold.tasks.fidelity import Reference, fidelity
from fivefold.tasks.text import windows
from fivefold.tokenizer import Tokenizer
from fivefold.workload import Workload

MODEL = "smollm2-135m"
WITH = {
    "gguf": 'gguf(type="q4_0")', "mixed_precision": "mixed_precision(bits=5.5)",
    "repair": 'prune_depth(layers=2) + repair + gguf(type="q8_0")',
    "kv_cache": 'kv_cache(type="q8_0") + gguf(type="f16")',
    "prompt_lookup": 'prompt_lookup + gguf(type="f16")',
    "prune_depth": 'prune_depth(layers=2) + gguf(type="f16")', "prune_width": 'prune_width + gguf(type="f16")',
    "slice_gpt": 'slice_gpt + gguf(type="f16")', "equalize": 'equalize + gguf(type="q4_0")',
    "awq": "awq + rtn", "quarot": "quarot + rtn", "spin_quant": "spin_quant + rtn", "kivi": "kivi(bits=2)",
    "sparse_storage": "wanda + sparse_storage", "speculative": 'speculative + gguf(type="f16")',
    "distill": "prune_depth(layers=15) + distill(steps=120)",
    "distill_text": "prune_depth(layers=15) + distill_text(steps=120)",
}
"""The recipe that shows a technique which cannot stand alone, has no default, or is best seen in another engine."""
LAST = ("distill", "distill_text", "spin_quant", "ternary")
"""Those that train, and take longest."""
RECORDS = Path(fivefold.study.__file__).parent / "records.json"
RATIOS = ("decode", "ttft", "energy")


def beside(kind: str) -> str:
    """What the rest is stored or computed in: in the torch engine the type this machine multiplies faster."""
    rates = [Machine.load().gemm(dtype).value or 0.0 for dtype in ("bfloat16", "float32")]
    return 'gguf(type="f16")' if kind == "gguf" else f'dtype(type="{"bfloat16" if rates[0] > rates[1] else "float32"}")'


def pair(name: str, model: Model) -> tuple[Recipe, Recipe]:
    """(with, without). Raises UserError when the recipe does not fit."""
    whole = Recipe.parse(WITH.get(name, name))
    kind = whole.plan(model).export.format
    if kind == "safetensors" and "dtype" not in str(whole):
        whole = Recipe.parse(f"{whole} + {beside(kind)}")
    whole.check(model)
    rest = [t for t in whole if t.name != name]
    without = Recipe(*rest)
    if not any(t.name in ("gguf", "dtype", "mixed_precision") for t in rest):
        without = Recipe.parse(f"{without} + {beside(kind)}" if rest else beside(kind))
    return whole, without


def one(name: str, given: argparse.Namespace) -> dict[str, Any]:
    model, machine = bundled.load(MODEL), Machine.load()
    whole, without = pair(name, model)
    builder = Builder(given.keep / "built", machine)
    before = builder.build(without, model)
    with PeakMemory() as window:
        after = builder.build(whole, model)
    tokenizer = Tokenizer(model.tokenizer_file)
    reference = _reference(model, tokenizer, given.keep)
    found = {
        "name": name, "with": str(whole), "without": str(without),
        "quality": [_quality(m, reference).to_json() for m in (before, after)],
        "seconds": _value(after, "seconds") - _value(before, "seconds"), "peak": window.peak.value,
        "coverage": list(after.model.coverage),
    }
    return found if given.quality else found | in_turn(before, after, tokenizer, machine, given)


def in_turn(
    before: Built, after: Built, tokenizer: Tokenizer, machine: Machine, given: argparse.Namespace
) -> dict[str, Any]:
    traffic = Workload.load("chat", tokenizer)
    traffic = replace(traffic, requests=spread(traffic.requests, given.requests))
    jobs = [Job(model=m.model, workload=traffic, label=label) for m, label in ((before, "without"), (after, "with"))]
    with Interleaved(jobs, machine=machine) as arms:
        first, second = arms.run(given.rounds)
        ratios = {metric: arms.ratio(metric, 1, 0).to_json() for metric in RATIOS}
    return {"ratios": ratios, "measured": [first.to_json(), second.to_json()]}


def _value(built: Built, name: str) -> float:
    found = built.made.get(name)
    return (found.value or 0.0) if found is not None else 0.0


def _reference(model: Model, tokenizer: Tokenizer, folder: Path) -> Reference:
    file = folder / "reference.npz"
    if not file.is_file():
        session = open_session(model)
        Reference.record(session, windows(tokenizer, "encyclopedia", "evaluation", 2048, 512)).save(file)
        session.close()
    return Reference.load(file)


def _quality(built: Built, reference: Reference) -> Any:
    session = open_session(built.model)
    try:
        return fidelity(session, reference).measurement
    finally:
        session.close()


def row(found: dict[str, Any]) -> list[str]:
    def measured(side: int, metric: str) -> Quantity:
        return Quantity.from_json(found["measured"][side]["quantities"][metric])

    def quality(side: int, metric: str) -> Quantity:
        return Quantity.from_json(found["quality"][side]["quantities"][metric])

    ratio = {m: interval(Quantity.from_json(q)) for m, q in found["ratios"].items()}
    size, peak = measured(1, "size").value or 0.0, measured(1, "memory").value or 0.0
    return [
        f"`{found['with']}` against `{found['without']}`",
        f"{number(size / 1e6, 0)} ({number(size / (measured(0, 'size').value or 1.0))}x)",
        f"{number(peak / 1e6, 0)} ({number(peak / (measured(0, 'memory').value or 1.0))}x)",
        number(measured(1, "decode").value, 0), ratio["decode"], ratio["ttft"], ratio["energy"],
        f"{number(quality(1, 'kl').value, 4)} ({number(quality(0, 'kl').value, 4)})",
        f"{number(quality(1, 'agreement').value, 3)} ({number(quality(0, 'agreement').value, 3)})",
        f"{number(found['seconds'], 0)} s, {number(found['peak'] / 1e6, 0)} MB",
        getattr(catalogue()[found["name"]], "headline", "") or "-",
    ]


def write_records(found: list[dict[str, Any]]) -> None:
    """What the search takes for its first guess (`study.records`)."""
    model = bundled.load(MODEL)
    predictor = Predictor(Machine.load(), model)

    def side(record: dict[str, Any], i: int, recipe: str) -> dict[str, Any]:
        values = {m: record["quality"][i]["quantities"][m]["value"] for m in ("agreement", "kl")}
        return {"recipe": recipe, "bits": predictor.bits_per_weight(Recipe.parse(recipe)), **values}

    whole = {
        "model": MODEL, "date": datetime.date.today().isoformat(), "command": "python benchmarks/techniques.py",
        "techniques": {r["name"]: {"with": side(r, 1, r["with"]), "without": side(r, 0, r["without"])} for r in found},
    }
    write_text(RECORDS, json.dumps(whole, indent=1) + "\n")


HEADS = ("technique", "file MB", "peak MB", "tokens/s", "decode x", "TTFT x", "J/token x", "KL (without)",
         "agreement (without)", "to make", "the paper reports, elsewhere")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", default="", help="comma-separated; default: every technique of inference")
    options.add_argument("--keep", type=Path, default=Path("runs/techniques"))
    options.add_argument("--rounds", type=int, default=4)
    options.add_argument("--requests", type=int, default=1, help="requests of the chat workload per round")
    options.add_argument("--quality", action="store_true", help="no times: only agreement and KL, for the records")
    options.add_argument("--one", help=argparse.SUPPRESS)
    options.add_argument("--quick", action="store_true", help="write no fragment")
    given = options.parse_args()
    if given.one:
        attempt(given.one, given.keep, lambda: one(given.one, given))
        return
    given.keep.mkdir(parents=True, exist_ok=True)
    names = sorted(of_inference(), key=lambda n: n in LAST)
    for name in [n for n in given.only.split(",") if n] or names:
        if not (given.keep / f"{name}.json").is_file():
            command = [sys.executable, __file__, "--one", name, "--keep", str(given.keep), "--rounds",
                       str(given.rounds), "--requests", str(given.requests), *["--quality"] * given.quality]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name}: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}", flush=True)
                continue
            print(f"{name}: {(given.keep / f'{name}.json').read_text()[:300]}", flush=True)
    records = [json.loads(file.read_text()) for n in names if (file := given.keep / f"{n}.json").is_file()]
    if not given.quick:
        write_records([f for f in records if "why" not in f])
    if given.quality:
        return
    body = ("SmolLM2-135M, off-grid parent; ratios are with / without, medians over rounds.\n\n"
            + table(HEADS, [row(f) for f in records if "why" not in f]))
    body += "".join(f"\n- `{f['name']}`: {f['why']}" for f in records if "why" in f)
    publish("techniques", "Every technique of inference, with and without", body, packages=("torch", "xllamacpp"),
            keep=not given.quick)


if __name__ == "__main__":
    main()
