"""A linear layer over codes of 2, 3, 4 and 8 bits beside a dense one in bfloat16, one token at a time.

    python benchmarks/kernel_grouped.py [--threads 2] [--rounds 15] [--rows 1] [--cpu-time]

Shapes are SmolLM2-135M's. Every layer exists in so many copies that together they do not fit the caches, and the copies
take turns, as layers do while a model decodes. All kinds take turns too, round by round; times are medians. Bytes are
what a layer stores, GB/s are those bytes per second, and "of bandwidth" is their share of what this machine reads at
best with as many threads. `--cpu-time` is for a busy machine: one thread and its processor time. Prints only.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median

import torch
from _common import facts, number, table

from fivefold.engines._layers.grouped import GroupedLinear
from fivefold.engines._layers.packed import PackedLinear, pack
from fivefold.machine import Machine
from fivefold.techniques._shared.grids import Grid, round_to

SHAPES = ((576, 576), (1536, 576), (576, 1536), (49152, 576))
KINDS = ((2, 64), (3, 64), (4, 64), (4, 32), (8, 0))
POOL = 128e6
"""Bytes of bfloat16 weights that take turns."""


def layers(rows: int, columns: int) -> dict[str, tuple[list[Callable[[torch.Tensor], torch.Tensor]], int]]:
    """Kind -> its copies and the bytes of one."""
    from fivefold.engines._layers import grouped

    count = max(2, round(POOL / (2 * rows * columns)))
    weight = torch.randn(rows, columns)
    dense = [torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16) for _ in range(count)]
    found: dict[str, tuple[list[Callable[[torch.Tensor], torch.Tensor]], int]] = {
        "bfloat16": (list(dense), 2 * rows * columns)
    }
    for bits, group in KINDS:
        codes = round_to(weight, Grid(bits=bits, group=group, symmetric=False))
        made = grouped.pack(codes.codes, codes.scale, codes.offset, bits)
        copies = [GroupedLinear({k: v.clone() for k, v in made.items()}, rows, columns) for _ in range(count)]
        found[f"{bits} bits, {f'groups of {group}' if group else 'per row'}"] = (
            list(copies), sum(t.nbytes for t in made.values()))
    for bits, group in ((4, 64), (8, 0)):
        stored = pack(weight, bits, group)
        found[f"PyTorch's {bits} bits, {f'groups of {group}' if group else 'per row'}"] = (
            [PackedLinear({k: v.clone() for k, v in stored.items()}) for _ in range(count)],
            sum(t.nbytes for t in stored.values()))
    return found


def seconds(
    copies: list[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor, calls: int, clock: Callable[[], float]
) -> float:
    start = clock()
    for call in range(calls):
        copies[call % len(copies)](x)
    return (clock() - start) / calls


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--rows", type=int, default=1, help="rows of activations")
    options.add_argument("--cpu-time", action="store_true")
    given = options.parse_args()
    given.threads = 1 if given.cpu_time else given.threads
    clock = time.thread_time if given.cpu_time else time.perf_counter
    torch.set_num_threads(given.threads)
    machine = Machine.load()
    known = machine.rates.get(f"bandwidth.{given.threads}")
    best = known.value if known else None
    lines = []
    with torch.inference_mode():
        for rows, columns in SHAPES:
            kinds = layers(rows, columns)
            x = torch.randn(given.rows, columns).bfloat16()
            times: dict[str, list[float]] = {name: [] for name in kinds}
            for turn in range(given.rounds + 1):
                for name, (copies, _) in kinds.items() if turn % 2 else reversed(kinds.items()):
                    took = seconds(copies, x, max(len(copies), round(4e7 / (rows * columns))), clock)
                    if turn:
                        times[name].append(took)
            dense = times["bfloat16"]
            for name, (_, size) in kinds.items():
                took = median(times[name])
                ratio = median(a / b for a, b in zip(dense, times[name], strict=True))
                lines.append([f"{rows} x {columns}, {name}", number(took * 1e6, 1), number(ratio, 2),
                              number(size / (2 * rows * columns), 3), number(size / took / 1e9, 1),
                              number(size / took / best, 2) if best else "-"])
    heads = ("layer", "us", "times as fast as bfloat16", "bytes of it", "GB/s", "of bandwidth")
    how = "processor time" if given.cpu_time else "wall clock"
    print(f"{given.threads} threads, {how}, {given.rows} rows of activations, {given.rounds} rounds\n")
    print(table(heads, lines))
    print(f"\n{facts(('torch',))}")


if __name__ == "__main__":
    main()
