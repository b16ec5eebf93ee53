"""Repair by distillation: what it wins back after mixed precision, and after dropping layers.

    python benchmarks/repair.py [--sizes 80,92,102,112,125] [--steps 160] [--windows 4] [--speed]

Model, text and engine as in quantization.py. At each size: the plain solver (see there), `mixed_precision` alone, and
`mixed_precision + repair`; then `prune_depth(layers=2)` in torch without and with repair. Training takes about 8 s per
step of 1,024 tokens on two idle cores.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from quantization import DOCS, WINDOW, Judge, Row, machine_line, overhead, plain_file, table

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
    options.add_argument("--sizes", default="80,92,102,112,125")
    options.add_argument("--steps", type=int, default=160)
    options.add_argument("--windows", type=int, default=4, help="evaluation windows of 512 tokens")
    options.add_argument("--speed", action="store_true", help="measure decoding speed too")
    options.add_argument("--no-plain", action="store_true", help="leave the plain solver out")
    given = options.parse_args()
    parent = bundled.load("smollm2-135m")
    weights = sum(rows * columns for rows, columns in matrices(parent).values())
    rows: list[Row] = []
    plain: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        judge, extra = Judge(parent, given.windows, work), overhead(parent, work)

        def add(name: str, model: Model, note: str = "") -> Row:
            rows.append(judge.row(name, model, speed=given.speed, note=note))
            print(rows[-1], flush=True)
            return rows[-1]

        def try_recipe(name: str, recipe: str) -> None:
            add(name, *built(parent, recipe, work / "recipe"))
            shutil.rmtree(work / "recipe")

        for size in given.sizes.split(","):
            if not given.no_plain:
                plain[size] = add(f"plain solver {size}", plain_file(parent, float(size), work, extra))
            mixed = f"mixed_precision(bits={(float(size) * 1e6 - extra) * 8 / weights:.5f})"
            try_recipe(f"mixed_precision {size}", mixed)
            try_recipe(f"mixed_precision + repair {size}", f"{mixed} + repair(steps={given.steps})")
        try_recipe("prune_depth(layers=2)", "prune_depth(layers=2)")
        try_recipe("prune_depth(layers=2) + repair", f"prune_depth(layers=2) + repair(steps={given.steps})")
    text = table(rows, lambda row: None if row.name.startswith("plain") else plain.get(row.name.split()[-1]))
    notes = "\n".join(f"- {row.name}: {row.note}" for row in rows if "repair" in row.name)
    title = (f"## Repair by distillation\n\nSmolLM2-135M off-grid parent, {given.windows * WINDOW} evaluation tokens,"
             f" {machine_line()}. `python benchmarks/repair.py --steps {given.steps}`\n\n")
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "repair.md").write_text(f"{title}{text}\n\n{notes}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
