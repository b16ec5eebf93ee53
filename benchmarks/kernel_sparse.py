"""The kernel for weights without their zeros against dense products, one row of activations.

    python benchmarks/kernel_sparse.py [--threads 2] [--rounds 15] [--inputs 1] [--cpu-time] [--keep]

Shapes are those of SmolLM2-135M and a larger one. The matrices of a shape fill several times the last-level cache and
are read in turn, as when decoding, so every call reads from memory. The kinds take turns; times are medians over
rounds, speed-ups the medians of the rounds' ratios. The limit is the bytes of the stored matrix over the bandwidth that
`fivefold doctor` measured with as many threads. "over perfect dense" is the sparse time over what reading the dense
bfloat16 matrix takes at that bandwidth: below 1, no dense product can be as fast. Dense is PyTorch's `linear` in
bfloat16, what the torch engine computes a dense model with, and in float32, on some processors the faster.
`--cpu-time` is for a machine that is busy with other work: one thread, its processor time instead of the clock.
Machines with AVX-512 and without have a fragment each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from _common import by_isa, number, publish, table
from torch import Tensor, nn

from fivefold.engines._layers.sparse import SparseLinear, pack
from fivefold.machine import Machine

SHAPES = ((576, 576), (1536, 576), (576, 1536), (49152, 576), (2048, 5504))
FILL = 160 << 20
"""Bytes of sparse matrices read in turn, five times a large last-level cache."""


def zeroed(rows: int, columns: int, kind: str) -> Tensor:
    """A random matrix with the zeros of "2:4", or of a share such as "50 %", anywhere."""
    weight = torch.randn(rows, columns)
    if kind == "2:4":
        groups = weight.view(rows, -1, 4)
        gone = groups.abs().argsort(2)[..., :2]
        return groups.scatter(2, gone, 0.0).view(rows, columns)
    return weight.masked_fill_(torch.rand(rows, columns) < float(kind.split()[0]) / 100, 0.0)


def per_call(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor, clock: Callable[[], float]) -> float:
    start = clock()
    for layer in layers:
        layer(x)
    return (clock() - start) / len(layers)


def copies(one: SparseLinear, count: int) -> list[SparseLinear]:
    tensors = {"mask": one.mask, "values": one.values}
    return [SparseLinear({k: t.clone() for k, t in tensors.items()}, one.in_features) for _ in range(count)]


def measured(rows: int, columns: int, kind: str, asked: argparse.Namespace, bandwidth: float) -> list[str]:
    weight = zeroed(rows, columns, kind)
    one = SparseLinear(pack(weight), columns)
    size, plain = one.mask.nbytes + one.values.nbytes + one.offsets.nbytes, rows * columns * 2
    sparse, count = copies(one, max(2, FILL // size)), max(2, FILL // plain)
    kinds: dict[str, list[nn.Module]] = {"sparse": [*sparse]}
    for name, dtype in (("dense", torch.bfloat16), ("float32", torch.float32)):
        kinds[name] = [nn.Linear(columns, rows, bias=False, dtype=dtype) for _ in range(count)]
        for layer in kinds[name]:
            layer.weight.data = weight.to(dtype, copy=True)
    x = torch.randn(asked.inputs, columns).bfloat16()
    clock = time.thread_time if asked.cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in kinds}
    with torch.inference_mode():
        for turn in range(asked.rounds + 1):
            for name in list(kinds)[:: 1 if turn % 2 else -1]:
                times[name].append(per_call(kinds[name], x.float() if name == "float32" else x, clock))
    ours, theirs, wide = (statistics.median(found[1:]) for found in times.values())
    ratios = [statistics.median(b / a for a, b in zip(times["sparse"][1:], times[name][1:], strict=True))
              for name in ("dense", "float32")]
    return [
        f"{rows} x {columns}", kind, number(size / rows / columns, 3),
        *(number(t * 1e6, 1) for t in (ours, theirs, wide)), *map(number, ratios),
        number(size / bandwidth / ours), number(plain / bandwidth / theirs), number(ours / (plain / bandwidth)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=Machine.load().cores)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--inputs", type=int, default=1)
    parser.add_argument("--kinds", default="50 %,2:4,70 %")
    parser.add_argument("--keep", action="store_true", help="write the fragment")
    parser.add_argument("--cpu-time", action="store_true")
    asked = parser.parse_args()
    if asked.cpu_time:
        asked.threads = 1
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    bandwidth = Machine.load().rates[f"bandwidth.{asked.threads}"].value
    assert bandwidth, "the machine has no measured bandwidth; run: fivefold doctor"
    rows = [
        measured(*shape, kind, asked, bandwidth)
        for shape in SHAPES for kind in asked.kinds.split(",")
    ]
    heads = ("matrix", "zeros", "bytes per weight", "sparse us", "dense us", "float32 us", "speed-up", "over float32",
             "sparse: share of limit", "dense: share of limit", "over perfect dense")
    said = f"{asked.inputs} row(s) of activations, {asked.threads} thread(s){', processor time' * asked.cpu_time}."
    name, title = "kernel_sparse", "Weights without their zeros against dense bfloat16"
    publish(*by_isa(name, title), f"{said}\n\n{table(heads, rows)}", packages=("torch",), keep=asked.keep)


if __name__ == "__main__":
    main()
