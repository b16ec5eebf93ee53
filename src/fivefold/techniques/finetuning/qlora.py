"""QLoRA: LoRA beside weights that lie in memory in 4 bits, so the frozen model takes a quarter of bfloat16's bytes.

    y = x W4' + (alpha / rank) x A' B'        W4: NF4 in blocks of 64 with double quantization, 4.127 bits per weight

W4 is turned back to the computing dtype one layer at a time, forward and again backward, and kept nowhere. Only A and B
are trained. What it saves is the memory of the frozen weights (embedding and head stay as they are); it costs the time
of unpacking, and the rounding error of the weights, beside which the adapter learns.

`base` says what the adapter is merged into. "stored" (default): the weights on disk. They are better than those it was
learned beside, and whatever it learned to undo of the rounding is then one correction too many. "nf4": what the 4 bits
stood for; the merged model is the one that was trained, rounding error included. The saved adapter, in peft's format,
is the same for both.

It does not help when the model fits in memory anyway: `lora` is faster and starts from exact weights.

Needs bitsandbytes (`pip install 'fivefold[qlora]'`). Source: Dettmers et al., arXiv 2305.14314.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fivefold.artifact import versions
from fivefold.errors import MissingExtra
from fivefold.model import Blueprint, Model, TrainPlan
from fivefold.space import Fixed, Range, Search
from fivefold.training.method import Adaptation, Lesson, Shapes, linear_shapes, model_shapes

if TYPE_CHECKING:
    import torch

    from fivefold.training.delta import Delta

PACKAGE = "bitsandbytes"


@dataclass(frozen=True, kw_only=True)
class Qlora(Adaptation):
    blocks = False
    libraries = ("peft",)
    headline = "65B on one 48GB GPU in 24 h: 99.3% of ChatGPT on Vicuna"
    perturbation = 2.5

    rank: Annotated[int, Range(1, 512, log=True), Search(4, 16, 64)] = 16
    """Rows of A and columns of B."""
    alpha: Annotated[float, Range(0.1, 1024, log=True), Fixed()] = 32.0
    """Scale of the change: it is multiplied by alpha / rank."""
    base: Annotated[Literal["stored", "nf4"], Fixed()] = "stored"
    """What the adapter is merged into: the weights on disk, or the 4-bit ones it was learned on."""
    rate: Annotated[float, Range(1e-7, 1e-1, log=True), Fixed()] = 5e-4
    """Peak learning rate."""

    def check(self, model: Model) -> None:
        super().check(model)
        if importlib.util.find_spec(PACKAGE) is None:
            raise MissingExtra(PACKAGE, extra="qlora")

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate)

    def inputs(self, model: Model) -> str:
        return f"{super().inputs(model)} {versions(PACKAGE)[PACKAGE]}"

    def shapes(self, blueprint: Blueprint) -> Shapes:
        found: dict[str, tuple[int, ...]] = {}
        for name, (outputs, inputs) in linear_shapes(blueprint).items():
            found |= {f"{name}.A": (self.rank, inputs), f"{name}.B": (outputs, self.rank)}
        return found

    def weight_bytes(self, blueprint: Blueprint, element: int) -> float:
        from fivefold.techniques._shared.nf4 import TABLES, nf4_bytes

        packed = linear_shapes(blueprint)
        rest = sum(prod(shape) for name, shape in model_shapes(blueprint).items() if name not in packed)
        return float(sum(nf4_bytes(prod(shape)) for shape in packed.values()) + TABLES + element * rest)

    def kept(self, blueprint: Blueprint) -> float:
        return float(self.rank * len(linear_shapes(blueprint)) / blueprint.layers)

    def mapped(self, blueprint: Blueprint, stored: int = 4, same: bool = False) -> float:
        return (4.0 + stored) * max(prod(shape) for shape in model_shapes(blueprint).values())

    def load(self, model: Model, dtype: torch.dtype) -> Any:
        from fivefold.techniques._shared.nf4 import load_nf4

        return load_nf4(model, dtype)

    def prepare(self, lesson: Lesson) -> dict[str, torch.nn.Parameter]:
        from fivefold.techniques._shared import lean_adapters
        from fivefold.techniques._shared.adapters import adapted, inject, lora_config

        trained = inject(lesson, lora_config(lesson, self.rank, self.alpha))
        for layer in adapted(lesson).values():
            lean_adapters.use(layer, lean_adapters.nf4)
        return trained

    def result(self, lesson: Lesson, value: Callable[[str], torch.Tensor]) -> Delta:
        from fivefold.techniques._shared.adapters import added, merged, turned
        from fivefold.techniques._shared.nf4 import exact

        flipped = turned(lesson)

        def change(layer: Any, stored: torch.Tensor) -> torch.Tensor:
            base = stored.T if flipped else stored
            whole = added(layer, exact(layer.get_base_layer()) if self.base == "nf4" else base)
            return whole.T if flipped else whole

        return merged(lesson, change)
