"""The gather kernels against dense products, one token at a time.

    python benchmarks/kernel_gather.py [--threads 1] [--rounds 15] [--sparsity 0.25,0.4,0.5,0.75] [--keep]

Layers as the torch engine holds them, called from Python. The layers of a row fill several times the last-level cache
and are read in turn, as when decoding, so every call reads from memory; the activations are random, and so are the
places skipped. The kinds take turns within a round: PyTorch's own bfloat16 product ("torch"), the same in float32, the
gather kernel with nothing skipped ("dense"), and with a share skipped. Ratios are medians over rounds with their
distribution-free 95 % interval. The limit of a kind is the bytes it must read over the bandwidth that `fivefold doctor`
measured with as many threads; "dense at its limit" is how many times faster than the gather kernel a perfect dense
product in bfloat16 would be: above 1 it would beat it. Machines with AVX-512 and without have a fragment each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import by_isa, interval, number, publish, table
from torch import Tensor, nn

from fivefold.engines._layers.selected_ffn import SelectedFeedForward
from fivefold.engines._layers.thresholded import ThresholdedLinear
from fivefold.engines._layers.thresholded_ffn import ThresholdedFeedForward
from fivefold.machine import Machine
from fivefold.quantity import Quantity

LINEAR = ((576, 576), (576, 1536), (1536, 576), (2048, 5504), (5504, 2048))
FEED_FORWARD = ((576, 1536), (2048, 5504))
FILL = 160 << 20
RANK = 32
DENSE = ("torch", "float32")
Kinds = dict[str, Callable[[], Any]]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).div_(shape[-1] ** 0.5).bfloat16()


class Plain(nn.Module):
    """A gated feed-forward as transformers computes it."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = random(ffn, width), random(ffn, width), random(width, ffn)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Plain:
        self.gate, self.up, self.down = fn(self.gate), fn(self.up), fn(self.down)
        return self

    def forward(self, x: Tensor) -> Tensor:
        f = nn.functional
        return f.linear(f.silu(f.linear(x, self.gate)) * f.linear(x, self.up), self.down)


class Wide(nn.Module):
    """A dense layer in float32 for bfloat16 activations."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.float()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float()).bfloat16()


def quantile(values: Tensor, share: float) -> float:
    return float(values.float().flatten().sort().values[int(share * values.numel()) - 1]) if share else 0.0


def dense_kinds(make: Callable[[], nn.Module]) -> Kinds:
    return {"torch": make, "float32": lambda: Wide(make())}


def linears(inputs: int, outputs: int, x: Tensor, shares: Sequence[float]) -> tuple[Kinds, dict[str, float]]:
    """How to make a layer of each kind, and the bytes it reads."""
    cuts = {f"{share:g}": quantile(x.abs(), share) for share in shares}
    size = 2.0 * inputs * outputs
    kinds = dense_kinds(lambda: nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16))
    for name, cut in {"dense": 0.0, **cuts}.items():
        kinds[name] = lambda cut=cut: ThresholdedLinear(random(inputs, outputs), None, cut)
    return kinds, {"torch": size, "float32": 2 * size, "dense": size, **{f"{s:g}": size * (1 - s) for s in shares}}


def feed_forwards(width: int, ffn: int, x: Tensor, way: str, shares: Sequence[float]) -> tuple[Kinds, dict[str, float]]:
    act, third = nn.functional.silu, 2.0 * width * ffn
    gate = random(ffn, width)
    kinds = dense_kinds(lambda: Plain(width, ffn))
    sizes = {"torch": 3 * third, "float32": 6 * third}

    def thresholded(share: float) -> nn.Module:
        cut, both = quantile(x.abs(), share), random(2 * ffn, width)
        gates, ups = (x.float().masked_fill(x.abs() <= cut, 0) @ both.float().T).split(ffn, 1)
        down = quantile((act(gates) * ups).abs(), share)
        return ThresholdedFeedForward(both.T.contiguous(), random(ffn, width), act, "silu", cut, down)

    def selected(share: float) -> nn.Module:
        found = {"gate": gate.clone(), "up": random(ffn, width), "down": random(ffn, width)}
        scores = act(x.float() @ gate.float().T).abs()
        if way == "predictor":
            found |= {"reduce": random(RANK, width), "expand": random(RANK, ffn), "offset": torch.zeros(ffn)}
            scores = x.float() @ found["reduce"].float().T @ found["expand"].float()
        cut = quantile(scores, share) if share or way == "gate" else -1e29
        return SelectedFeedForward(found, act, "silu", cut)

    extra = 2.0 * RANK * (width + ffn) if way == "predictor" else 0.0
    for share in (0.0, *shares):
        name = f"{share:g}" if share else "dense"
        kinds[name] = lambda share=share: (thresholded if way == "inputs" else selected)(share)
        sizes[name] = extra + third * (3 - {"inputs": 3, "gate": 2, "predictor": 3}[way] * share)
    return kinds, sizes


def per_call(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """Median over the layers of one round, so that a moment lost to other work does not count."""
    times = []
    for layer in layers:
        start = time.perf_counter()
        layer(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def skipped(layers: Sequence[Any]) -> float:
    """The share that the layers really skipped since they were made."""
    kept = sum(layer.kept if isinstance(layer.kept, int) else sum(layer.kept) for layer in layers)
    whole = [1 if isinstance(layer.kept, int) else layer.width + layer.ffn for layer in layers]
    return 1 - kept / sum(layer.seen * size for layer, size in zip(layers, whole, strict=True))


def measured(
    what: str, made: tuple[Kinds, dict[str, float]], x: Tensor, rounds: int, bandwidth: float
) -> list[list[str]]:
    kinds, sizes = made
    whole = sizes["torch"]
    layers = {name: [make() for _ in range(max(3, int(FILL // whole)))] for name, make in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name in list(kinds)[:: 1 if turn % 2 else -1]:
                took = per_call(layers[name], x)
                if turn:
                    times[name].append(took)
    rows, names = [], list(kinds)
    for name in names:
        if name not in DENSE:
            assert abs(skipped(layers[name]) - (0 if name == "dense" else float(name))) < 0.02, f"{what} {name}"
        ours = statistics.median(times[name])
        over = [
            interval(Quantity.median_of([a / b for a, b in zip(times[base], times[name], strict=True)], "x"))
            if names.index(base) < names.index(name) else "-" for base in names[:3]
        ]
        rows.append([what, name, number(ours * 1e6, 1), *over, number(sizes[name] / bandwidth / ours),
                     number(ours * bandwidth / whole)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sparsity", default="0.25,0.4,0.5,0.75")
    parser.add_argument("--keep", action="store_true", help="write the fragment")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    shares = [float(share) for share in asked.sparsity.split(",")]
    bandwidth = Machine.load().rates[f"bandwidth.{asked.threads}"].value
    assert bandwidth, "the machine has no measured bandwidth; run: fivefold doctor"
    rows = []
    for inputs, outputs in LINEAR:
        x = torch.randn(1, inputs).bfloat16()
        rows += measured(f"{inputs} x {outputs}", linears(inputs, outputs, x, shares), x, asked.rounds, bandwidth)
    for width, ffn in FEED_FORWARD:
        x = torch.randn(1, width).bfloat16()
        for way in ("inputs", "gate", "predictor"):
            made = feed_forwards(width, ffn, x, way, shares)
            rows += measured(f"feed-forward {width}, {ffn} by {way}", made, x, asked.rounds, bandwidth)
    heads = ("layer (inputs x outputs)", "kind or share skipped", "us", "times faster than torch",
             "than float32", "than dense", "share of limit", "dense at its limit")
    said = f"One token, {asked.threads} thread(s), {asked.rounds} rounds; predictors of rank {RANK}."
    name, title = "kernel_gather", "Skipping inputs and neurons against dense bfloat16"
    publish(*by_isa(name, title), f"{said}\n\n{table(heads, rows)}", packages=("torch",), keep=asked.keep)


if __name__ == "__main__":
    main()
