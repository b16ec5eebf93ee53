"""LoRA: the weights stay as they are; a product of two thin matrices beside every linear layer learns the task.

    y = x W' + (alpha / rank) x A' B'        A (rank, inputs) random, B (outputs, rank) zero

Trained are rank x (inputs + outputs) numbers per layer, so gradients and averages take almost nothing, and the backward
pass skips the weights' own gradients: two thirds of the arithmetic of full fine-tuning. Afterwards
W + (alpha / rank) B A is one matrix again, so the model served is as fast as before; what is shipped to somebody who
has the parent is the adapter.

All linear layers, the feed-forward ones included, and ten times the learning rate of full fine-tuning: with these it
learns as well as full fine-tuning while the data fit into the adapter. It does not help when they do not (long training
on much new text), and merged weights lose a little when they are quantized afterwards.

With `base`, quantize then adapt: the matrices are rounded first, and the adapter learns beside what is left of them.
The merged weights are the rounded ones plus the adapter; the saved adapter belongs to the rounded ones.

The adapter is made and saved by `peft` (it can be loaded there); the passes are our own (`training.lean`).

Sources: Hu et al., arXiv 2106.09685; Schulman et al., "LoRA Without Regret" (Thinking Machines, 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fivefold.errors import Misfit
from fivefold.model import Blueprint, Model, TrainPlan
from fivefold.space import Fixed, Range, Search
from fivefold.training.method import Adaptation, Lesson, Shapes, linear_shapes

if TYPE_CHECKING:
    import torch

    from fivefold.training.delta import Delta

BLOCK = 32
"""Weights of a row that share a scale, in all types of `base`."""


@dataclass(frozen=True, kw_only=True)
class Lora(Adaptation):
    libraries = ("peft",)
    headline = "GPT-3 175B with 10,000x fewer trained parameters, 3x less GPU memory"
    perturbation = 2.0

    rank: Annotated[int, Range(1, 512, log=True), Search(4, 16, 64)] = 16
    """Rows of A and columns of B."""
    alpha: Annotated[float, Range(0.1, 1024, log=True), Fixed()] = 32.0
    """Scale of the change: it is multiplied by alpha / rank."""
    base: Annotated[Literal["stored", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"], Fixed()] = "stored"
    """What the adapter is learned beside and merged into: the weights as stored, or rounded to a type of llama.cpp."""
    rate: Annotated[float, Range(1e-7, 1e-1, log=True), Fixed()] = 5e-4
    """Peak learning rate: about ten times that of full fine-tuning."""

    def check(self, model: Model) -> None:
        super().check(model)
        widths = sorted({inputs for _, inputs in linear_shapes(model.blueprint).values()})
        if self.base != "stored" and any(width % BLOCK for width in widths):
            raise Misfit(f"{self} does not fit: {model.name} has rows of {', '.join(map(str, widths))}, which must be"
                         f' multiples of {BLOCK}; leave base="stored"')

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate)

    def shapes(self, blueprint: Blueprint) -> Shapes:
        found: dict[str, tuple[int, ...]] = {}
        for name, (outputs, inputs) in linear_shapes(blueprint).items():
            found |= {f"{name}.A": (self.rank, inputs), f"{name}.B": (outputs, self.rank)}
        return found

    def kept(self, blueprint: Blueprint) -> float:
        return float(self.rank * len(linear_shapes(blueprint)) / blueprint.layers)

    def load(self, model: Model, dtype: torch.dtype) -> Any:
        from fivefold.techniques._shared.adapters import round_linears

        module = super().load(model, dtype)
        if self.base != "stored":
            round_linears(model, module, self.base)
        return module

    def prepare(self, lesson: Lesson) -> dict[str, torch.nn.Parameter]:
        from fivefold.techniques._shared.adapters import inject, lora_config

        return inject(lesson, lora_config(lesson, self.rank, self.alpha))

    def result(self, lesson: Lesson, value: Callable[[str], torch.Tensor]) -> Delta:
        from fivefold.techniques._shared.adapters import added, merged, rounded, saved, turned

        if self.base == "stored":
            return merged(lesson)
        flipped = turned(lesson)

        def change(layer: Any, stored: torch.Tensor) -> torch.Tensor:
            base = rounded(stored.T, self.base).T if flipped else rounded(stored, self.base)
            return added(layer, base)

        return merged(lesson, change, {**saved(lesson), "base.json": {"base": self.base}})
