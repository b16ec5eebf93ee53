"""Peak memory to apply each technique of inference to a model of 1.5 billion parameters: at most 20 GiB?

    python benchmarks/memory.py [--only wanda,gptq] [--keep runs/memory] [--width 2048] [--layers 30]

The model is a Llama of that shape with random weights in bfloat16 (2 bytes each) and the bundled tokenizer: what a
technique holds depends on shapes, not on what was learnt. Settings that only repeat work (calibration windows, trials,
steps) are at their least, those that decide what is held are the defaults. Each is applied in a process of its own;
the peak is that of resident memory, pages of mapped files included, minus what the process holds before it begins.
Killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from _common import attempt, number, of_inference, publish, table

from fivefold import bundled
from fivefold.meters.memory import PeakMemory
from fivefold.model import Model, load
from fivefold.recipe import Recipe, catalogue

GIB = 2**30
LIMIT = 20.0
BESIDE = {
    "repair": "prune_depth(layers=2) + repair(steps=1)", "sparse_storage": "magnitude + sparse_storage",
    "distill": "prune_depth(layers=15) + distill(steps=1)", "prune_depth": "prune_depth(layers=2)",
    "distill_text": "prune_depth(layers=15) + distill_text(steps=1)", "gguf": 'gguf(type="q4_0")',
    "mixed_precision": "mixed_precision(bits=5.5)", "equalize": 'equalize + gguf(type="q4_0")', "kivi": "kivi(bits=2)",
    "kv_cache": 'kv_cache(type="q8_0")',
}
LEAST = {"windows": 1, "steps": 1, "points": 2, "tokens": 512}


def recipe(name: str) -> Recipe:
    """The technique at its default where memory is concerned, with the least work."""
    found = Recipe.parse(BESIDE.get(name, name))
    return Recipe(*(replace(t, **{k: v for k, v in LEAST.items() if hasattr(t, k)}) for t in found))


def large(folder: Path, width: int, layers: int) -> Model:
    """A random Llama in bfloat16 with the bundled tokenizer, made once."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    parent = bundled.load("smollm2-135m")
    if not (folder / "done").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        config = LlamaConfig(
            vocab_size=parent.blueprint.vocab, hidden_size=width, intermediate_size=int(2.75 * width) // 64 * 64,
            num_hidden_layers=layers, num_attention_heads=width // 128, num_key_value_heads=width // 512,
            max_position_embeddings=2048, tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        for file in parent.path.glob("tokenizer*"):
            shutil.copy(file, folder / file.name)
        (folder / "done").touch()
    return load(folder).but(calibration=parent.calibration)


def one(name: str, given: argparse.Namespace) -> dict[str, Any]:
    import tempfile

    import torch  # noqa: F401  the libraries are there before the window opens

    model, started = load(given.keep / "model"), time.monotonic()
    wanted = recipe(name)
    wanted.check(model)
    with tempfile.TemporaryDirectory(dir=given.keep) as scratch, PeakMemory() as before:
        before.close()
        with PeakMemory() as window:
            for technique in wanted.build:
                model = technique.apply(model.but(work=Path(scratch)))
            model = wanted.build.techniques[-1].finish(model) if wanted.build.techniques else model
    return {
        "name": name, "recipe": str(wanted), "peak": (window.peak.value or 0.0) - (before.peak.value or 0.0),
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", default="")
    options.add_argument("--keep", type=Path, default=Path("runs/memory"))
    options.add_argument("--width", type=int, default=2048)
    options.add_argument("--layers", type=int, default=30)
    options.add_argument("--limit", type=float, default=1800.0, help="seconds for one technique")
    options.add_argument("--quick", action="store_true", help="write no fragment")
    options.add_argument("--one", help=argparse.SUPPRESS)
    given = options.parse_args()
    given.keep.mkdir(parents=True, exist_ok=True)
    if given.one:
        attempt(given.one, given.keep, lambda: one(given.one, given))
        return
    model = large(given.keep / "model", given.width, given.layers)
    names = [n for n in of_inference() if not catalogue()[n].runtime]
    for name in [n for n in given.only.split(",") if n] or names:
        file = given.keep / f"{name}.json"
        if not file.is_file():
            command = [sys.executable, __file__, "--one", name, "--keep", str(given.keep)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=given.limit)
                said = (done.stderr.strip().splitlines() or ["no reason"])[-1] if done.returncode else ""
            except subprocess.TimeoutExpired:
                said = f"not done after {given.limit:.0f} s"
            if said:
                file.write_text(json.dumps({"name": name, "why": said}), encoding="utf-8")
        print(file.read_text(), flush=True)
    report(model, [json.loads(f.read_text()) for n in names if (f := given.keep / f"{n}.json").is_file()], given.quick)


def report(model: Model, found: list[dict[str, Any]], quick: bool) -> None:
    numbers = model.blueprint.parameters
    rows = [[f"`{r['recipe']}`", number(r["peak"] / GIB, 1), number(r["peak"] / (2 * numbers)),
             "yes" if r["peak"] <= LIMIT * GIB else "no", number(r["seconds"], 0)] for r in found if "why" not in r]
    body = (f"A Llama of {numbers / 1e9:.2f} billion random parameters, {2 * numbers / GIB:.1f} GiB in bfloat16; goal:"
            f" at most {LIMIT:.0f} GiB. Work that only repeats is at its least, so seconds are a lower bound.\n\n"
            + table(("recipe", "peak GiB", "x the file", "within", "seconds"), rows))
    body += "".join(f"\n- `{r['name']}`: {r['why']}" for r in found if "why" in r)
    publish("memory", "Memory to treat a model of 1.5 billion parameters", body, packages=("torch",), keep=not quick)


if __name__ == "__main__":
    main()
