"""Weights of SmolLM2-135M at 4 bits: rtn, gptq, awq and hqq beside llm-compressor and auto-round on the same text.

    python benchmarks/quantize_peers.py --peer-python PATH [--windows 16] [--group 32] [--symmetric] [--iterations 200]

PATH is an interpreter with `llmcompressor` and `auto-round`. Every method sees the same calibration tokens and rounds
the same 210 linear layers to the same grid (bits, group, symmetric or not); embedding and head stay. The weights each
one ends with are turned back to float32 and compared in one torch model on the same evaluation tokens, so the rows
differ by the numbers chosen alone. Seconds are from the model's folder to the finished one, memory is the peak of that
process; both without importing packages. Ours are the technique applied as a user would.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import number, publish, table

from fivefold import bundled
from fivefold.model import Model

LENGTH = 512
PEERS = {"llm-compressor RTN": "rtn", "llm-compressor GPTQ": "gptq", "llm-compressor AWQ": "awq",
         "auto-round": "autoround"}


def ours(grid: str, windows: int) -> dict[str, str]:
    """Name -> recipe."""
    asymmetric = "symmetric" not in grid
    found = {
        "rtn": f"rtn({grid})", "rtn fitted": f'rtn({grid}, scales="fit")',
        "hqq": f"hqq({grid})", "awq + rtn": f"awq({grid}, windows={windows}) + rtn({grid})",
        "gptq, one pass": f"gptq({grid}, windows={windows}, sweeps=0)", "gptq": f"gptq({grid}, windows={windows})",
        "awq + gptq": f"awq({grid}, windows={windows}) + gptq({grid}, windows={windows})",
    }
    return found if asymmetric else {k: v for k, v in found.items() if k != "hqq"}


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    kl: float
    error: float
    loss: float
    agreement: float
    seconds: float | None = None
    peak: float | None = None


class Judge:
    """The parent's answers, and the module whose weights are replaced."""

    def __init__(self, parent: Model, count: int) -> None:
        import torch

        from fivefold.tasks.text import windows
        from fivefold.tokenizer import Tokenizer
        from fivefold.training.module import load_module

        text = windows(Tokenizer(parent.tokenizer_file), "encyclopedia", "evaluation", count * LENGTH, LENGTH)
        self.tokens = torch.tensor(np.array(text))
        self.module = load_module(parent, torch.float32)
        self.original = {k: v.clone() for k, v in self.module.state_dict().items()}
        self.want = [self._answers(row) for row in self.tokens]

    def _answers(self, row: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self.module(row[None]).logits[0, :-1].float().log_softmax(-1)

    def row(self, name: str, weights: Mapping[str, Any], seconds: float | None, peak: float | None) -> Row:
        import torch

        self.module.load_state_dict({**self.original, **weights})
        self.module.tie_weights()
        kl, loss, same = [], [], []
        for row, want in zip(self.tokens, self.want, strict=True):
            got = self._answers(row)
            kl.append((want.exp() * (want - got)).sum(-1))
            loss.append(-got.gather(1, row[1:, None])[:, 0])
            same.append(got.argmax(-1) == want.argmax(-1))
        every = torch.cat(kl)
        return Row(name=name, kl=float(every.mean()), error=float(every.std() / len(every) ** 0.5),
                   loss=float(torch.cat(loss).mean()), agreement=float(torch.cat(same).float().mean()),
                   seconds=seconds, peak=peak)


def work_ours(recipe: str, work: Path, threads: int) -> None:
    """Apply it in this process and tell where the model lies; a process of its own, for its peak memory."""
    import torch
    import transformers  # noqa: F401

    from fivefold.recipe import Recipe

    torch.set_num_threads(threads)
    start = time.perf_counter()
    done = Recipe.parse(recipe).apply(bundled.load("smollm2-135m").but(work=work))
    seconds = time.perf_counter() - start
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak": int(line.split()[1]) * 1024, "path": str(done.path),
                      "said": done.coverage[-1]}))


def floats(folder: Path) -> dict[str, Any]:
    """The parameters of a model folder as they compute, float32."""
    from fivefold.engines._layers import MANIFEST, grouped, read_manifest
    from fivefold.weights import read_tensors

    stored = {name: t.torch() for name, t in read_tensors(folder)}
    layers = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    found = {}
    for name in layers:
        parts = {k: stored.pop(f"{name}.{k}") for k in grouped.TENSORS if f"{name}.{k}" in stored}
        tiles, blocks, _ = parts["codes"].shape
        found[f"{name}.weight"] = grouped.unpack(parts, tiles * grouped.ROWS, blocks * grouped.COLUMNS)
    return {**found, **{k: v.float() for k, v in stored.items()}}


def run(command: list[str]) -> dict[str, Any]:
    """The JSON of the last line a worker prints; a worker that fails ends the benchmark with what it said."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{command[1:3]} failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def rows(given: argparse.Namespace, scratch: Path) -> list[Row]:
    from safetensors.torch import load_file

    from fivefold.techniques._shared.calibration import windows

    parent = bundled.load("smollm2-135m")
    judge = Judge(parent, given.evaluation)
    np.save(scratch / "tokens.npy", windows(parent, given.windows, LENGTH))
    found = [judge.row("parent", {}, None, None)]

    def add(name: str, weights: Mapping[str, Any], told: Mapping[str, Any]) -> None:
        found.append(judge.row(name, weights, told["seconds"], told["peak"]))
        print(found[-1], flush=True)

    grid = f"bits={given.bits}, group={given.group}{', symmetric=True' if given.symmetric else ''}"
    for number_, (name, recipe) in enumerate(ours(grid, given.windows).items()):
        told = run([sys.executable, __file__, "--ours", recipe, "--scratch", str(scratch / f"work{number_}"),
                    "--threads", str(given.threads)])
        add(f"`{name}`", floats(Path(told["path"])), told)
    wish = {"bits": given.bits, "group": given.group, "symmetric": given.symmetric, "threads": given.threads,
            "iterations": given.iterations, "batch": given.batch}
    worker = str(Path(__file__).parent / "_quantize_worker.py")
    for name, method in PEERS.items() if given.peer_python else ():
        out = scratch / f"{method}.safetensors"
        told = run([given.peer_python, worker, method, str(parent.path), str(scratch / "tokens.npy"), str(out),
                    json.dumps(wish)])
        add(name, load_file(out), told)
        out.unlink()
    return found


def goals(found: list[Row]) -> str:
    """The best of ours beside the best peer."""
    mine = [r for r in found if r.name.startswith("`")]
    peers = [r for r in found if r.name in PEERS]
    if not peers:
        return ""
    own, other = min(mine, key=lambda r: r.kl), min(peers, key=lambda r: r.kl)
    points = 100 * (own.agreement - other.agreement)
    said = {True: "reached", False: "not reached"}
    return (f"- KL no worse than the best peer's: **{said[own.kl <= other.kl]}**, {own.name} {own.kl:.4f},"
            f" {other.name} {other.kl:.4f}\n"
            f"- agreement less than 1 point below it: **{said[points > -1]}**, {points:+.1f} points")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--peer-python")
    options.add_argument("--bits", type=int, default=4)
    options.add_argument("--group", type=int, default=32)
    options.add_argument("--symmetric", action="store_true")
    options.add_argument("--windows", type=int, default=16, help="calibration windows of 512 tokens")
    options.add_argument("--evaluation", type=int, default=4, help="evaluation windows of 512 tokens")
    options.add_argument("--iterations", type=int, default=200, help="of auto-round, per layer")
    options.add_argument("--batch", type=int, default=8, help="windows per iteration of auto-round")
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options.add_argument("--quick", action="store_true", help="write no fragment")
    options.add_argument("--ours", help=argparse.SUPPRESS)
    options.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.ours:
        given.scratch.mkdir(parents=True, exist_ok=True)
        work_ours(given.ours, given.scratch, given.threads)
        return
    with tempfile.TemporaryDirectory() as scratch:
        found = rows(given, Path(scratch))
    lines = [[r.name, f"{r.kl:.4f} ± {r.error:.4f}", f"{r.loss:.4f}", f"{r.agreement:.3f}", number(r.seconds, 0),
              number(r.peak and r.peak / 1e6, 0)] for r in found]
    grid = f"{given.bits} bits in groups of {given.group}, {'symmetric' if given.symmetric else 'with offsets'}"
    what = (f"SmolLM2-135M off-grid parent, {grid}; embedding and head kept. Calibration on {given.windows * LENGTH}"
            f" tokens, evaluation on {given.evaluation * (LENGTH - 1)} others, in float32 torch for all; KL with its"
            f" standard error over tokens. auto-round: {given.iterations} iterations of {given.batch} windows.")
    heads = ("method", "KL from the parent", "log-loss", "agreement", "s to make", "peak MB")
    publish("quantize_peers", "Weight quantization beside its peers", f"{what}\n\n{goals(found)}\n\n"
            f"{table(heads, lines)}", packages=("torch", "transformers"), keep=not given.quick)


if __name__ == "__main__":
    main()
