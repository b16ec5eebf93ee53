"""Bottleneck adapters: two small layers behind attention and behind the feed-forward block of every layer.

    z <- z + gelu(z D' + d) U' + u        D (size, width), U (width, size), near zero at the start

The first adapters there were: 2 (2 x width x size + size + width) numbers per layer, the rest frozen. Their authors
came within 0.4 points of full fine-tuning on GLUE with 3.6 % of the numbers (they trained the norms' gains too, which
is not done here). The bend between the two layers computes what no change of a matrix can.

The price: they cannot be merged. They lie beside the weights and stand in the path of every token served, two more
small products per block; only the torch engine applies them, and techniques that rewrite or export weights cannot
follow. Where a merged adapter learns the task as well, it is the better choice.

`engines/_bottleneck.py` is the module that is trained here and served there.

Source: Houlsby et al., arXiv 1902.00751.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fivefold import engines
from fivefold.files import sha256
from fivefold.model import Blueprint, Model, TrainPlan, Trait
from fivefold.space import Fixed, Range, Search
from fivefold.training.method import Adaptation, Lesson, Shapes

if TYPE_CHECKING:
    import torch

    from fivefold.training.delta import Delta


@dataclass(frozen=True, kw_only=True)
class Houlsby(Adaptation):
    blocks = False
    breaks = Adaptation.breaks | {Trait.PLAIN_GRAPH}
    may_raise = ("quality", "compute")
    headline = "3.6% of parameters, within 0.4% of full fine-tuning on GLUE"
    perturbation = 2.0

    size: Annotated[int, Range(1, 4096, log=True), Search(8, 32, 128)] = 32
    """Width of the bottleneck."""
    rate: Annotated[float, Range(1e-7, 1e-1, log=True), Fixed()] = 1e-3
    """Peak learning rate."""

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate)

    def inputs(self, model: Model) -> str:
        return f"{super().inputs(model)} {sha256(Path(engines.__file__).parent / '_bottleneck.py')}"

    def shapes(self, blueprint: Blueprint) -> Shapes:
        width = blueprint.width
        one = {"down": (self.size, width), "down_bias": (self.size,), "up": (width, self.size), "up_bias": (width,)}
        return {f"{i}.{place}.{name}": shape for i in range(blueprint.layers) for place in ("attention", "ffn")
                for name, shape in one.items()}

    def kept(self, blueprint: Blueprint) -> float:
        b = blueprint
        return 2.0 * (b.width + 2 * self.size) - b.heads * b.head_dim

    def prepare(self, lesson: Lesson) -> dict[str, torch.nn.Parameter]:
        from fivefold.engines._bottleneck import install

        return install(lesson.module, self.size)

    def result(self, lesson: Lesson, value: Callable[[str], torch.Tensor]) -> Delta:
        from fivefold.engines._bottleneck import files
        from fivefold.training.delta import Delta

        return Delta(files=files(self.size, {name: value(name) for name in lesson.trained}), beside=True)
