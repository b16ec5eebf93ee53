"""Lottery-ticket sparse fine-tuning: learn everything, keep the places that moved most, learn again in those alone.

    1   full fine-tuning for a part of the steps:                    W1
    2   the k places with the largest |W1 - W0| of all weights;      rewind: W = W0
    3   the rest of the steps with the gradient masked to them:      W = W0 + k differences

Both phases begin with a fresh optimiser and have their own warm-up and decay. Held-out scores of the first do not
count: its state is not sparse, so it could not be what is handed on. The result is the parent plus k numbers at 8 bytes
each. Differences learned apart from one parent, such as a language and a task, add up.

It saves nothing while training: it takes the memory of full fine-tuning with all gradients held and a byte more per
weight, and half of the steps only find the places. It does not help where one copy of the model is all there will be.

Source: Ansell et al., arXiv 2110.07560.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from fivefold.model import Blueprint, Model, TrainPlan
from fivefold.space import Fixed, Range, Search
from fivefold.training.method import Adaptation, Lesson, Shapes, boundary, model_shapes

if TYPE_CHECKING:
    import torch

    from fivefold.training.delta import Delta


@dataclass(frozen=True, kw_only=True)
class LtSft(Adaptation):
    lowers = {"network": "direct"}
    may_raise = ("quality", "memory", "compute")
    passes = 3.0
    whole = True
    masks = True
    perturbation = 3.0

    share: Annotated[float, Range(1e-6, 0.5, log=True), Search(0.01, 0.05)] = 0.05
    """Share of the weights that may differ from the parent's in the end."""
    first: Annotated[float, Range(0.05, 0.95), Fixed()] = 0.5
    """Share of the steps that look for the places."""
    rate: Annotated[float, Range(1e-7, 1e-1, log=True), Fixed()] = 5e-5
    """Peak learning rate of both phases."""

    def check(self, model: Model) -> None:
        super().check(model)
        if model.train.steps:
            boundary(self.name, model.train, self.first)

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate)

    def shapes(self, blueprint: Blueprint) -> Shapes:
        return model_shapes(blueprint)

    def weight_bytes(self, blueprint: Blueprint, element: int) -> float:
        return super().weight_bytes(blueprint, element) + sum(map(math.prod, self.shapes(blueprint).values()))

    def prepare(self, lesson: Lesson) -> dict[str, torch.nn.Parameter]:
        from fivefold.techniques._shared.masks import empty

        every = dict(lesson.module.named_parameters())
        lesson.extra["masks"] = empty(every)
        return every

    def phases(self, lesson: Lesson) -> Sequence[int]:
        return (boundary(self.name, lesson.plan, self.first),)

    def anew(self, lesson: Lesson, value: Callable[[str], torch.Tensor]) -> Iterable[str]:
        from fivefold.techniques._shared.masks import fill_largest
        from fivefold.training.run import stored_value

        total = sum(p.numel() for p in lesson.trained.values())
        fill_largest(lesson.extra["masks"], lambda name: value(name) - stored_value(lesson, name),
                     max(1, round(self.share * total)))
        return list(lesson.trained)

    def gradients(self, lesson: Lesson, step: int) -> None:
        from fivefold.techniques._shared.masks import apply

        if step > self.phases(lesson)[0]:
            apply(lesson.trained, lesson.extra["masks"])

    def buffers(self, lesson: Lesson) -> Mapping[str, torch.Tensor]:
        masks: Mapping[str, torch.Tensor] = lesson.extra["masks"]
        return masks

    def result(self, lesson: Lesson, value: Callable[[str], torch.Tensor]) -> Delta:
        from fivefold.techniques._shared.masks import learned

        return learned(lesson, lesson.extra["masks"], value)

    def numbers(self, lesson: Lesson) -> int:
        from fivefold.techniques._shared.masks import chosen

        return chosen(lesson.extra["masks"])

    def covered(self, lesson: Lesson) -> str:
        return f"of {super().numbers(lesson):,}, those that moved most in the first {self.phases(lesson)[0]} steps"
