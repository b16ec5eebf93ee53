"""Full fine-tuning: every weight is trained, with AdamW, in about the memory the weights and their averages take.

    bytes per weight     plain AdamW, mixed precision        here
    weight               4 + 2 (the copy computed with)      2 + 2 (the two halves of a float32)
    gradient             4                                   2, of one tensor at a time
    averages             8                                   8, or 4 in bfloat16

The update runs inside the backward pass: a gradient is used and dropped as soon as it is complete. The upper half of
each float32 weight is the bfloat16 that is computed with, so no pass casts and no update is lost
(`training.precision`).

The most expressive method and the one others are measured by; it does not help where the data are few (it forgets what
they do not show) nor where many adapted copies of one model are kept: its difference is as large as the model.

Sources: Loshchilov & Hutter, arXiv 1711.05101; the fused update is LOMO's, Lv et al., arXiv 2306.09782.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from fivefold.model import Blueprint, TrainPlan
from fivefold.space import Fixed, Range
from fivefold.training.method import Adaptation, Lesson, Shapes, model_shapes

if TYPE_CHECKING:
    import torch

    from fivefold.training.delta import Delta
    from fivefold.training.optimizer import Optimizer


@dataclass(frozen=True, kw_only=True)
class Full(Adaptation):
    passes = 3.0
    whole = True
    fused = True
    perturbation = 4.0

    rate: Annotated[float, Range(1e-7, 1e-1, log=True), Fixed()] = 5e-5
    """Peak learning rate."""
    averages: Annotated[Literal["float32", "bfloat16"], Fixed()] = "bfloat16"
    """How AdamW's averages are held."""
    held: Annotated[Literal["split", "kahan", "stochastic", "nearest"], Fixed()] = "split"
    """What keeps small updates of bfloat16 weights from being lost."""

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate, held=self.held)

    def shapes(self, blueprint: Blueprint) -> Shapes:
        return model_shapes(blueprint)

    def default_optimizer(self) -> Optimizer:
        import torch

        from fivefold.training.adamw import AdamW

        return AdamW(dtype=getattr(torch, self.averages))

    def prepare(self, lesson: Lesson) -> dict[str, torch.nn.Parameter]:
        return dict(lesson.module.named_parameters())

    def result(self, lesson: Lesson, value: Callable[[str], torch.Tensor]) -> Delta:
        from fivefold.training.delta import Delta

        weights = {name: partial(value, name) for name in lesson.trained}
        return Delta(weights=weights, files={"full.json": {"kind": "full", "tensors": len(weights)}})
