"""Pruning SmolLM2-135M: magnitude, wanda and sparsegpt beside llm-compressor's modifiers on the same text.

    python benchmarks/prune_peers.py --peer-python PATH [--windows 16] [--kinds free,2:4]

PATH is an interpreter with `llmcompressor`. Every method sees the same calibration tokens and zeroes half of the same
210 linear layers, anywhere ("free") or two of every four ("2:4"); embedding and head stay. The weights each one ends
with are compared in one float32 torch model on the same evaluation tokens, so the rows differ by the numbers alone.
Seconds are from the model's folder to the finished one, memory is the peak of that process; both without importing
packages.
llm-compressor prunes by magnitude only along a training schedule, so there is no row for that. "as published" leaves
out the conjugate gradients that ours ends with.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _common import number, publish, table
from quantize_peers import LENGTH, Judge, Row, run, work_ours

from fivefold import bundled

PEERS = ("wanda", "sparsegpt")
FREE = {"magnitude": "matrix", "wanda": "row", "sparsegpt": "block"}


def ours(kind: str, sparsity: float, windows: int) -> dict[str, str]:
    """Name -> recipe."""
    def recipe(name: str, **more: Any) -> str:
        share = {"sparsity": sparsity} if kind == "free" else {"pattern": kind}
        fields = {**share, **more, **({} if name == "magnitude" else {"windows": windows})}
        return f"{name}({', '.join(f'{k}={json.dumps(v)}' for k, v in fields.items())})"

    return {"magnitude": recipe("magnitude"), "wanda": recipe("wanda"), "sparsegpt": recipe("sparsegpt"),
            "sparsegpt as published": recipe("sparsegpt", refine=0)}


def rows(given: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, Row]]:
    from safetensors.torch import load_file

    from fivefold.techniques._shared.calibration import windows
    from fivefold.weights import read_tensors

    parent = bundled.load("smollm2-135m")
    judge = Judge(parent, given.evaluation)
    np.save(scratch / "tokens.npy", windows(parent, given.windows, LENGTH))
    yield "", judge.row("parent", {}, None, None)
    worker = str(Path(__file__).parent / "_prune_worker.py")
    for kind in given.kinds.split(","):
        for name, recipe in ours(kind, given.sparsity, given.windows).items():
            work = scratch / f"{kind}-{name}".replace(":", "-").replace(" ", "-")
            told = run([sys.executable, __file__, "--ours", recipe, "--scratch", str(work),
                        "--threads", str(given.threads)])
            weights = {k: t.torch().float() for k, t in read_tensors(Path(told["path"]))}
            yield kind, judge.row(f"`{name}`", weights, told["seconds"], told["peak"])
        for method in PEERS if given.peer_python else ():
            out = scratch / f"{method}.safetensors"
            wish = {"sparsity": given.sparsity if kind == "free" else 0.5, "threads": given.threads,
                    "structure": "0:0" if kind == "free" else kind}
            told = run([given.peer_python, worker, method, str(parent.path), str(scratch / "tokens.npy"), str(out),
                        json.dumps(wish)])
            yield kind, judge.row(f"llm-compressor {method}", load_file(out), told["seconds"], told["peak"])
            out.unlink()


def goals(found: list[tuple[str, Row]]) -> str:
    """Ours beside the peer of the same name."""
    by = {(kind, row.name): row for kind, row in found}
    said = []
    for (kind, name), peer in by.items():
        method = name.removeprefix("llm-compressor ")
        if method != name:
            own = by[kind, f"`{method}`"]
            verdict = "reached" if own.loss <= peer.loss else "not reached"
            said.append(f"- {method}, {kind}: log-loss no worse than llm-compressor's: **{verdict}**,"
                        f" {own.loss:.4f} and {peer.loss:.4f}")
    return "\n".join(said)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--peer-python")
    options.add_argument("--kinds", default="free,2:4")
    options.add_argument("--sparsity", type=float, default=0.5, help="of the free pattern")
    options.add_argument("--windows", type=int, default=16, help="calibration windows of 512 tokens")
    options.add_argument("--evaluation", type=int, default=2, help="evaluation windows of 512 tokens")
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options.add_argument("--keep", action="store_true", help="write the fragment")
    options.add_argument("--ours", help=argparse.SUPPRESS)
    options.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.ours:
        work_ours(given.ours, given.scratch, given.threads)
        return
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for one in rows(given, Path(scratch)):
            found.append(one)
            print(one, flush=True)
    heads = ("method", "zeros", "log-loss", "KL", "agreement", "seconds", "peak MB")
    lines = [(row.name, kind or "-", number(row.loss, 4), number(row.kl, 4), number(row.agreement, 3),
              number(row.seconds, 1), number(row.peak and row.peak / 1e6, 0)) for kind, row in found]
    said = f"{given.windows} calibration windows, {given.evaluation} evaluation windows of {LENGTH} tokens."
    publish("prune_peers", "Pruning beside llm-compressor", f"{said}\n\n{table(heads, lines)}\n\n{goals(found)}",
            packages=("torch", "transformers"), keep=given.keep)


if __name__ == "__main__":
    main()
