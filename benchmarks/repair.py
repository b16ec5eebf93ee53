"""Repair by distillation: what it wins back after mixed precision, and after dropping layers.

    python benchmarks/repair.py [--sizes 80,92] [--steps 60] [--layers 2] [--windows 4]

Model, text and engine as in quantization.py. At each size `mixed_precision` without and with `repair`; then layers
dropped, without and with repair, stored in Q8_0. Training takes 3 to 8 s per step of 1,024 tokens on two idle cores.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from _common import publish
from quantization import WINDOW, Judge, Row, overhead, table

from fivefold import bundled
from fivefold.export import export
from fivefold.model import Model
from fivefold.recipe import Recipe
from fivefold.techniques._shared.gguf_types import matrices


def built(parent: Model, recipe: str, folder: Path) -> tuple[Model, str]:
    """The exported model, and what its last technique said with the time it took."""
    started = time.monotonic()
    model = Recipe.parse(recipe).apply(parent.but(work=folder / "work"))
    said = f"{model.coverage[-1]}; {time.monotonic() - started:.0f} s"
    return export(model, folder / "out"), said


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--sizes", default="80,92")
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--layers", type=int, default=2, help="layers dropped before the repair of a pruned model")
    options.add_argument("--windows", type=int, default=4, help="evaluation windows of 512 tokens")
    options.add_argument("--quick", action="store_true", help="write no fragment")
    given = options.parse_args()
    parent = bundled.load("smollm2-135m")
    weights = sum(rows * columns for rows, columns in matrices(parent).values())
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        judge, extra = Judge(parent, given.windows, work), overhead(parent, work)

        def add(name: str, recipe: str) -> None:
            model, said = built(parent, recipe, work / "recipe")
            rows.append(judge.row(name, model, note=said))
            print(rows[-1], flush=True)
            shutil.rmtree(work / "recipe")

        repair = f"repair(steps={given.steps})"
        for size in filter(None, given.sizes.split(",")):
            mixed = f"mixed_precision(bits={(float(size) * 1e6 - extra) * 8 / weights:.5f})"
            add(f"mixed_precision {size}", mixed)
            add(f"mixed_precision + repair {size}", f"{mixed} + {repair}")
        pruned, stored = f"prune_depth(layers={given.layers})", 'gguf(type="q8_0", embedding="q8_0")'
        add(f"{pruned} + q8_0", f"{pruned} + {stored}")
        add(f"{pruned} + repair + q8_0", f"{pruned} + {repair} + {stored}")
    before = {row.name.replace(" + repair", ""): row for row in rows if "repair" not in row.name}
    text = table(rows, lambda row: before.get(row.name.replace(" + repair", "")) if "repair" in row.name else None)
    text = text.replace("ratio to the plain solver", "ratio to without repair")
    notes = "\n".join(f"- {row.name}: {row.note}" for row in rows if "repair" in row.name)
    what = (f"SmolLM2-135M off-grid parent in llama.cpp, {given.windows * WINDOW} evaluation tokens;"
            f" {given.steps} steps of 1,024 tokens.")
    publish("repair", "Repair by distillation", f"{what}\n\n{text}\n\n{notes}", packages=("torch",),
            keep=not given.quick)


if __name__ == "__main__":
    main()
