"""DoRA: LoRA turns each row of a weight, and its length is a number trained by itself.

    W' = m * (W + s B A) / |W + s B A|        |.| by row; m starts at |W|, B at zero, s = alpha / rank

Full fine-tuning changes lengths and directions of rows about independently; LoRA changes both in proportion. With m
apart, DoRA can do either: rank x (inputs + outputs) + outputs numbers per layer, one more per row than LoRA, and its
authors report two to four points more on commonsense reasoning at equal rank. The norm counts as a constant in the
backward pass, which is the authors' own saving. At the start the model is the parent, exactly; afterwards W' is one
matrix again.

It costs more time and memory per step than LoRA (the norms, and the outputs of four layers kept), and gives little
where LoRA already reaches full fine-tuning.

The adapter is made and saved by `peft`; the passes are our own (`_shared.lean_adapters`).

Source: Liu et al., arXiv 2402.09353.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from fivefold.model import Blueprint, TrainPlan
from fivefold.space import Fixed, Range, Search
from fivefold.training.method import Adaptation, Lesson, Shapes, linear_shapes

if TYPE_CHECKING:
    import torch

    from fivefold.training.delta import Delta


@dataclass(frozen=True, kw_only=True)
class Dora(Adaptation):
    blocks = False
    libraries = ("peft",)
    headline = "commonsense average: LLaMA-7B 78.4 (LoRA 76.3), LLaMA3-8B 85.2 (LoRA 80.8)"
    perturbation = 2.0

    rank: Annotated[int, Range(1, 512, log=True), Search(4, 16, 64)] = 16
    """Rows of A and columns of B."""
    alpha: Annotated[float, Range(0.1, 1024, log=True), Fixed()] = 32.0
    """Scale of the turn: it is multiplied by alpha / rank."""
    rate: Annotated[float, Range(1e-7, 1e-1, log=True), Fixed()] = 5e-4
    """Peak learning rate."""

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate)

    def shapes(self, blueprint: Blueprint) -> Shapes:
        found: dict[str, tuple[int, ...]] = {}
        for name, (outputs, inputs) in linear_shapes(blueprint).items():
            found |= {f"{name}.A": (self.rank, inputs), f"{name}.B": (outputs, self.rank), f"{name}.m": (outputs,)}
        return found

    def weight_bytes(self, blueprint: Blueprint, element: int) -> float:
        squares = 4 * sum(outputs for outputs, _ in linear_shapes(blueprint).values())
        return super().weight_bytes(blueprint, element) + squares

    def kept(self, blueprint: Blueprint) -> float:
        b = blueprint
        thin = self.rank * len(linear_shapes(b)) / b.layers
        return thin + 2.0 * b.width + b.heads * b.head_dim + b.kv_heads * b.head_dim

    def prepare(self, lesson: Lesson) -> dict[str, torch.nn.Parameter]:
        from fivefold.techniques._shared import lean_adapters
        from fivefold.techniques._shared.adapters import NAME, adapted, inject, lora_config, turned
        from fivefold.training.run import stored_value

        trained = inject(lesson, lora_config(lesson, self.rank, self.alpha, use_dora=True))
        for name, layer in adapted(lesson).items():
            layer.squares = stored_value(lesson, f"{name}.weight").square().sum(0 if turned(lesson) else 1)
            layer.lora_magnitude_vector[NAME].weight.data = layer.squares.sqrt()
            lean_adapters.use(layer, lean_adapters.dora)
        return trained

    def result(self, lesson: Lesson, value: Callable[[str], torch.Tensor]) -> Delta:
        from fivefold.techniques._shared.adapters import NAME, added, merged, turned

        rows = 0 if turned(lesson) else 1

        def change(layer: Any, stored: torch.Tensor) -> torch.Tensor:
            whole = added(layer, stored)
            gain: torch.Tensor = layer.lora_magnitude_vector[NAME].weight / whole.norm(dim=rows)
            return whole * gain.unsqueeze(rows)

        return merged(lesson, change)
