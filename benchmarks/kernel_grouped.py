"""A linear layer over codes of 2, 3, 4 and 8 bits or of -1, 0, 1 beside dense ones, one token at a time.

    python benchmarks/kernel_grouped.py [--threads 2] [--rounds 15] [--rows 1] [--cpu-time] [--keep]

Shapes are SmolLM2-135M's and one of a larger model. Every layer exists in so many copies that together they do not fit
the caches, and the copies take turns, as layers do while a model decodes. All kinds take turns too, round by round;
times are medians, ratios those of the rounds. Bytes are what a layer stores, GB/s are those bytes per second, and "of
bandwidth" is their share of what this machine reads at best with as many threads. `--cpu-time` is for a busy machine:
one thread and its processor time. `--keep` writes the fragment: machines with AVX-512 and without have one each.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from statistics import median

import torch
from _common import by_isa, number, publish, table

from fivefold.engines._layers import grouped, ternary
from fivefold.engines._layers.grouped import GroupedLinear
from fivefold.engines._layers.packed import PackedLinear, pack
from fivefold.engines._layers.ternary import TernaryLinear
from fivefold.machine import Machine
from fivefold.techniques._shared.grids import Grid, round_to

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 5504), (49152, 576))
KINDS = ((2, 64), (3, 64), (4, 64), (4, 32), (8, 0))
POOL = 128e6
"""Bytes of every kind that take turns."""
DENSE = {"bfloat16": torch.bfloat16, "float32": torch.float32}
Call = Callable[[torch.Tensor], torch.Tensor]


def copied(make: Callable[[dict[str, torch.Tensor]], Call], tensors: dict[str, torch.Tensor]) -> tuple[list[Call], int]:
    """Layers that together have POOL bytes, and the bytes of one."""
    size = sum(t.nbytes for t in tensors.values())
    count = max(2, round(POOL / size))
    return [make({k: v.clone() for k, v in tensors.items()}) for _ in range(count)], size


def dense(tensors: dict[str, torch.Tensor]) -> Call:
    return functools.partial(torch.nn.functional.linear, weight=tensors["weight"])


def layers(rows: int, columns: int) -> dict[str, tuple[list[Call], int]]:
    """Kind -> its copies and the bytes of one."""
    weight = torch.randn(rows, columns)
    found = {name: copied(dense, {"weight": weight.to(dtype)}) for name, dtype in DENSE.items()}
    for bits, group in KINDS:
        codes = round_to(weight, Grid(bits=bits, group=group, symmetric=False))
        made = grouped.pack(codes.codes, codes.scale, codes.offset, bits)
        name = f"{bits} bits, {f'groups of {group}' if group else 'per row'}"
        found[name] = copied(lambda t: GroupedLinear(t, rows, columns), made)
    made = ternary.pack(weight.sign(), torch.ones(rows, 1))
    for activations, name in ((0, "ternary"), (8, "ternary, activations in 8 bits")):
        found[name] = copied(lambda t, a=activations: TernaryLinear(t, columns, 0, a), made)
    for bits, group in ((4, 64), (8, 0)):
        name = f"PyTorch's {bits} bits, {f'groups of {group}' if group else 'per row'}"
        found[name] = copied(PackedLinear, pack(weight, bits, group))
    return found


def seconds(
    copies: list[Call], x: torch.Tensor, calls: int, clock: Callable[[], float]
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
    options.add_argument("--keep", action="store_true", help="write the fragment")
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
                    own = x.to(DENSE.get(name, torch.bfloat16))
                    took = seconds(copies, own, max(len(copies), round(4e7 / (rows * columns))), clock)
                    if turn:
                        times[name].append(took)
            for name, (_, size) in kinds.items():
                took = median(times[name])
                ratios = [median(a / b for a, b in zip(times[d], times[name], strict=True)) for d in DENSE]
                lines.append([f"{rows} x {columns}, {name}", number(took * 1e6, 1), *map(number, ratios),
                              number(size / (2 * rows * columns), 3), number(size / took / 1e9, 1),
                              number(size / took / best, 2) if best else "-"])
    heads = ("layer", "us", "times as fast as bfloat16", "as float32", "bytes of bfloat16", "GB/s", "of bandwidth")
    how = "processor time" if given.cpu_time else "wall clock"
    told = f"{given.threads} threads, {how}, {given.rows} rows of activations, {given.rounds} rounds"
    name, title = "kernel_grouped", "Codes of 2 to 8 bits times a vector"
    publish(*by_isa(name, title), f"{told}\n\n{table(heads, lines)}", packages=("torch",), keep=given.keep)


if __name__ == "__main__":
    main()
