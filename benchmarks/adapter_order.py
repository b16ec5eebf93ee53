"""Adapter, then quantize; or quantize, then adapter: which answers better once it is served in 4 bits?

    python benchmarks/adapter_order.py [--steps 60] [--items 500] [--type q4_0]

The same examples, steps and test items as `finetune.py`. Each way ends as the file that is served: weights and adapter
merged, then written in `--type` by the same exporter. The adapter of the first learned beside exact weights and is
rounded with them; those of the others learned beside weights that were rounded before (to the same type, or to NF4), so
they could make good what rounding broke, and are rounded too. Paired item by item with the first.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _common import number, publish, table
from finetune import TEMPLATES, answered, write

from fivefold import bundled
from fivefold.budget import TrainingBudget
from fivefold.export import export
from fivefold.model import load
from fivefold.recipe import Recipe
from fivefold.study import train as study
from fivefold.tasks.paired import verdict


def one(way: str, stored: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train, export in `stored`, and ask both the merged and the rounded model."""
    run, out = folder / "run", folder / "out"
    for old in (run, out):
        shutil.rmtree(old, ignore_errors=True)
    done = study.train(study.Request(
        model=bundled.load("smollm2-135m"), data=folder / "train.jsonl", out=run, budget=TrainingBudget(), recipe=way,
        template=TEMPLATES["sentiment"], steps=given.steps, items=2,
    ))
    merged = load(run / "model")
    rounded = export(Recipe.parse(stored).apply(merged.but(work=folder / "work")), out)
    return {
        "way": f"{way} + {stored}", "loss": done.after, "bytes": rounded.path.stat().st_size,
        "merged": answered(merged.path, "sentiment", given.items, folder),
        "served": answered(rounded.path, "sentiment", given.items, folder),
    }


def percent(right: list[bool]) -> str:
    share = float(np.mean(right))
    return f"{100 * share:.1f} ± {196 * float(np.sqrt(share * (1 - share) / len(right))):.1f}"


def against(first: list[bool], second: list[bool]) -> str:
    d = verdict(first, second, 0.0)
    return f"{100 * d.difference:+.1f} [{100 * d.interval[0]:+.1f}, {100 * d.interval[1]:+.1f}]"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--items", type=int, default=500)
    options.add_argument("--type", default="q4_0")
    options.add_argument("--quick", action="store_true", help="write no fragment")
    given = options.parse_args()
    stored = f'gguf(type="{given.type}", embedding="q8_0")'
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write("sentiment", folder)
        for way in ("lora", f'lora(base="{given.type}")', "qlora"):
            found.append(one(way, stored, given, folder))
            print(found[-1]["way"], percent(found[-1]["merged"]), percent(found[-1]["served"]), flush=True)
    first = found[0]
    rows = [
        [f"`{f['way']}`", number(f["bytes"] / 1e6, 1), number(f["loss"], 3), percent(f["merged"]), percent(f["served"]),
         against(f["merged"], f["served"]), against(first["served"], f["served"]) if f is not first else ""]
        for f in found
    ]
    heads = ["way", "file MB", "held-out loss", "merged, right %", "served, right %", "rounding costs, points",
             "against the first, points"]
    body = (f"SmolLM2-135M, IMDB beginnings -> SST-2 accuracy, {given.steps} steps of 1,024 positions, {given.items}"
            f" test items; served by llama.cpp.\n\n{table(heads, rows)}")
    publish("adapter_order", "Adapter, then quantize, or the other way round", body,
            packages=("torch", "peft", "xllamacpp"), keep=not given.quick)


if __name__ == "__main__":
    main()
