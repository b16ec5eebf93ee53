"""The layer with weights and activations in 8 bits against dense and other 8-bit ways, few and many tokens.

    python benchmarks/kernel_int8.py [--threads 2] [--rounds 15] [--tokens 1,8,128,512] [--keep]

Shapes are those of SmolLM2-135M and a larger one. The matrices of a shape fill several times the last-level cache in
bfloat16 and are read in turn, as a model does, so every call reads its weights from memory. In a round every way has
its turn, in an order that turns round; times are medians over rounds, ratios the medians of the rounds' ratios. Every
way starts from bfloat16 activations and ends in bfloat16 ones.

    bfloat16        torch linear
    float32         the same in float32
    ours            engines/_layers/int8_activations: rounding, product and scaling in one call
    weight-only     torch _weight_int8pack_mm (1 to 8 tokens), else turned back and multiplied in bfloat16 (`int8`)
    _int_mm         the same arithmetic as ours in torch operations, around its own product in whole numbers

The limit is the larger of two times: the matrix's bytes over the bandwidth that `fivefold doctor` measured with as many
threads, and the operations over the rate of torch's product of square matrices, taken in every round beside the rest:
in whole numbers where the processor has VNNI, else in float32, which whole numbers can exceed. Machines with AVX-512
and without have a fragment each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from _common import by_isa, number, publish, table
from torch import Tensor, nn

from fivefold.engines._layers.int8_activations import Int8Linear, pack
from fivefold.engines._layers.packed import PackedLinear
from fivefold.engines._layers.packed import pack as pack_weights
from fivefold.machine import Machine

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 5504))
FILL = 96 << 20
"""Bytes of bfloat16 matrices read in turn: three times the last-level cache of the machine of the report."""
ENOUGH = 0.03
"""Seconds a way is timed for in a round, at most as many calls as there are matrices."""
SIDE = 2048

Call = Callable[[Tensor], Tensor]


class Wide(nn.Linear):
    """A layer in float32 for bfloat16 activations."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).bfloat16()


def in_torch(q: Tensor, scale: Tensor) -> Call:
    across = q.T

    def call(x: Tensor) -> Tensor:
        step = x.float().abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        p = (x.float() / step).round().to(torch.int8)
        return (torch._int_mm(p, across).float() * (step * scale)).bfloat16()

    return call


def ways(rows: int, columns: int, count: int) -> dict[str, list[Call]]:
    found: dict[str, list[Call]] = {"bfloat16": [], "float32": [], "ours": [], "weight-only": [], "_int_mm": []}
    for _ in range(count):
        weight = torch.randn(rows, columns)
        dense = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
        dense.weight.data = weight.bfloat16()
        packed = pack(weight)
        found["bfloat16"].append(dense)
        found["float32"].append(Wide(columns, rows, bias=False))
        found["ours"].append(Int8Linear(packed))
        found["weight-only"].append(PackedLinear(pack_weights(weight, 8)))
        found["_int_mm"].append(in_torch(packed["qweight"].clone(), packed["scale"]))
    return found


def per_call(calls: Sequence[Call], x: Tensor) -> float:
    start, done, spent = time.perf_counter(), 0, 0.0
    while done < len(calls) and spent < ENOUGH:
        calls[done](x)
        done, spent = done + 1, time.perf_counter() - start
    return spent / done


def measured(
    calls: dict[str, list[Call]], shape: tuple[int, int], tokens: int, rounds: int, bandwidth: float, rates: list[float]
) -> list[str]:
    rows, columns = shape
    whole = "vnni" in Machine.load().isa
    square = torch.randint(-127, 128, (SIDE, SIDE), dtype=torch.int8 if whole else torch.float32)
    product = torch._int_mm if whole else torch.mm
    x = torch.randn(tokens, columns).bfloat16()
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    start = dict.fromkeys(names, 0)
    with torch.inference_mode():
        for turn in range(rounds + 1):
            rates.append(2 * SIDE**3 / per_call([lambda a: product(a, a)], square))
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                own = calls[name]
                turned = own[start[name] :] + own[: start[name]]
                start[name] = (start[name] + len(own) // 3) % len(own)
                times[name].append(per_call(turned, x))
    median = {name: statistics.median(found[1:]) for name, found in times.items()}

    def against(name: str) -> str:
        ratios = sorted(b / a for a, b in zip(times["ours"][1:], times[name][1:], strict=True))
        return number(statistics.median(ratios))

    size, work = rows * columns + 4 * rows, 2 * rows * columns * tokens
    peak = statistics.median(rates[-rounds:])
    limit = max(size / bandwidth, work / peak)
    return [
        f"{rows} x {columns}", str(tokens), *[number(median[name] * 1e6, 1) for name in names],
        *[against(name) for name in names if name != "ours"],
        number(limit / median["ours"]), "reading" if size / bandwidth > work / peak else "arithmetic",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=Machine.load().cores)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", default="1,8,128,512")
    parser.add_argument("--keep", action="store_true", help="write the fragment")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    bandwidth = Machine.load().rates[f"bandwidth.{asked.threads}"].value
    assert bandwidth, "the machine has no measured bandwidth; run: fivefold doctor"
    rows: list[list[str]] = []
    rates: list[float] = []
    for shape in SHAPES:
        calls = ways(*shape, max(2, FILL // (2 * shape[0] * shape[1])))
        rows += [measured(calls, shape, int(n), asked.rounds, bandwidth, rates) for n in asked.tokens.split(",")]
    heads = ("matrix", "tokens", "bfloat16 us", "float32 us", "ours us", "weight-only us", "_int_mm us",
             "against bfloat16", "against float32", "against weight-only", "against _int_mm",
             "ours: share of the limit", "limit")
    peak, isa = statistics.median(rates), Machine.load().isa
    said = (
        f"{asked.threads} thread(s); {'whole-number' if 'vnni' in isa else 'float32'} products of {SIDE} x {SIDE} at"
        f" {peak / 1e9:.0f} GOP/s,"
        f" reads at {bandwidth / 1e9:.1f} GB/s. \"Against\" is how many times faster ours is."
    )
    name, title = "kernel_int8", "Weights and activations in 8 bits"
    publish(*by_isa(name, title), f"{said}\n\n{table(heads, rows)}", packages=("torch",), keep=asked.keep)


if __name__ == "__main__":
    main()
