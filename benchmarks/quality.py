"""What recipes do to the answers of SmolLM2-135M: log-loss, KL, agreement and bytes, in the engine that serves them.

    python benchmarks/quality.py [--keep runs/quality] ["prune_depth(layers=4)" ...]

Without recipes, those whose figures the techniques' own texts quote. KL and agreement are against the parent in float32
in the torch engine, on 2,048 held-out tokens in windows of `--window`. Killed, the same command goes on (`--keep`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import interval, number, publish, table

from fivefold import bundled
from fivefold.engines import open_session
from fivefold.errors import FivefoldError
from fivefold.machine import Machine
from fivefold.model import Model
from fivefold.quantity import Quantity
from fivefold.recipe import Recipe
from fivefold.study.build import Builder
from fivefold.tasks.fidelity import Reference, fidelity
from fivefold.tasks.text import windows
from fivefold.tokenizer import Tokenizer

RECIPES = (
    "dtype(type=\"bfloat16\")",
    *(f"{rounding}(bits={bits}, group=64)" for bits in (4, 3) for rounding in ("rtn", "hqq", "gptq")),
    "awq(group=64) + rtn(group=64)", "awq(group=64) + gptq(group=64)", "quarot + rtn(group=64)",
    *(f"{pruning}{pattern}" for pattern in ("", '(pattern="2:4")') for pruning in ("magnitude", "wanda", "sparsegpt")),
    *(f"prune_width(channels={share}{how})" for share in (0.17, 0.33) for how in ("", ', importance="activation"')),
    "prune_width(channels=0.06, groups=1)", "prune_depth(layers=4)", "prune_depth(layers=8)",
    "slice_gpt(slice=0.1)", "slice_gpt(slice=0.28)", "low_rank(ratio=0.127)", 'low_rank(ratio=0.127, weigh="nothing")',
    "teal(sparsity=0.25)", "teal(sparsity=0.5)", "cats(sparsity=0.5)", "deja_vu(sparsity=0.4)",
    "llm_int8(threshold=1e6)", "smooth_quant", "llm_int8", 'llm_int8(columns="runtime")',
    "kivi(bits=4, residual=32)", "kivi(bits=2, residual=32)", "ternary(steps=0)",
)


def measured(text: str, parent: Model, reference: Reference, work: Path) -> dict[str, Any]:
    started = time.monotonic()
    try:
        built = Builder(work, Machine.load()).build(Recipe.parse(text), parent)
        seconds = time.monotonic() - started
        session = open_session(built.model)
        found = fidelity(session, reference).measurement
        size = session.describe()["weight_bytes"]
        session.close()
    except FivefoldError as error:
        return {"recipe": text, "why": str(error)}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {"recipe": text, "quality": found.to_json(), "bytes": size, "seconds": seconds}


def row(found: dict[str, Any]) -> list[str]:
    told = {name: Quantity.from_json(q) for name, q in found["quality"]["quantities"].items()}
    return [f"`{found['recipe']}`", number(found["bytes"] / 1e6, 1), number(told["loss"].value, 4),
            interval(told["kl"], 4), interval(told["agreement"], 3), number(found["seconds"], 0)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("recipes", nargs="*")
    options.add_argument("--window", type=int, default=512)
    options.add_argument("--keep", type=Path, default=Path("runs/quality"))
    options.add_argument("--quick", action="store_true", help="write no fragment")
    given = options.parse_args()
    parent = bundled.load("smollm2-135m")
    given.keep.mkdir(parents=True, exist_ok=True)
    session = open_session(parent)
    sample = windows(Tokenizer(parent.tokenizer_file), "encyclopedia", "evaluation", 2048, given.window)
    reference = Reference.record(session, sample)
    session.close()
    records = []
    for text in given.recipes or RECIPES:
        name = hashlib.sha256(f"{text} {given.window}".encode()).hexdigest()[:16]
        file = given.keep / f"{name}.json"
        if not file.is_file():
            with tempfile.TemporaryDirectory() as scratch:
                file.write_text(json.dumps(measured(text, parent, reference, Path(scratch) / "built")))
        records.append(json.loads(file.read_text()))
        print(" | ".join(row(records[-1])) if "why" not in records[-1] else records[-1], flush=True)
    heads = ("recipe", "weights MB", "log-loss", "KL", "agreement", "s to make")
    body = (f"SmolLM2-135M off-grid parent, 2,048 evaluation tokens in windows of {given.window}; KL and agreement"
            f" against the parent in float32.\n\n{table(heads, [row(r) for r in records if 'why' not in r])}")
    body += "".join(f"\n- `{r['recipe']}`: {r['why']}" for r in records if "why" in r)
    publish("quality", "What each recipe does to the answers", body, packages=("torch", "xllamacpp"),
            keep=not given.quick)


if __name__ == "__main__":
    main()
