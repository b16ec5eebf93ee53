"""Child-Tuning: every step updates only a child network, a part of the weights; the rest of the gradient is masked.

    w <- w - rate * update(g * M)

    F   (task-free)     M ~ Bernoulli(p) / p for every number, drawn anew in every step: g * M is g on average, and the
                        noise keeps a large model from fitting few examples too closely
    D   (task-driven)   M = 1 on the p of all weights with the largest Fisher information on the task, for the whole
                        run:  F_i = mean over batches of (d loss / d w_i)^2

F's draws are a function of seed and step, D's choice of the parent and the first batches, so a resumed run repeats an
uninterrupted one. F_i squares the gradients of whole steps, as the authors' code does, not of single examples; they are
taken before the first step and cost as much as that many steps.

It saves nothing while training: it takes the memory of full fine-tuning with all gradients held, and for D a byte more
per weight. D's result differs from the parent in p of the weights, at 8 bytes each: smaller than the weights in float32
below p = 0.5. F's differs everywhere. It does not help with many examples: it is a regulariser.

Source: Xu et al., arXiv 2109.05687.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fivefold.model import Blueprint, TrainPlan
from fivefold.space import Fixed, Range, Search
from fivefold.training.method import Adaptation, Lesson, Shapes, model_shapes

if TYPE_CHECKING:
    import torch

    from fivefold.training.delta import Delta


@dataclass(frozen=True, kw_only=True)
class ChildTuning(Adaptation):
    lowers = {"network": "direct"}
    may_raise = ("quality", "memory")
    passes = 3.0
    whole = True
    masks = True
    headline = "four models on GLUE: +1.5..8.6 on average over vanilla fine-tuning, +0.6..1.3 over prior techniques"
    perturbation = 3.0

    mode: Literal["D", "F"] = "D"
    """F draws the child anew in every step, D chooses it once by Fisher information."""
    share: Annotated[float, Range(1e-4, 1.0, log=True), Search(0.1, 0.3)] = 0.3
    """Share p of the weights in the child."""
    batches: Annotated[int, Range(1, 4096, log=True), Fixed()] = 16
    """Steps' worth of training data that D measures Fisher information on."""
    rate: Annotated[float, Range(1e-7, 1e-1, log=True), Fixed()] = 5e-5
    """Peak learning rate."""

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate)

    def shapes(self, blueprint: Blueprint) -> Shapes:
        return model_shapes(blueprint)

    def weight_bytes(self, blueprint: Blueprint, element: int) -> float:
        mask = sum(map(math.prod, self.shapes(blueprint).values())) if self.mode == "D" else 0
        return super().weight_bytes(blueprint, element) + mask

    def prepare(self, lesson: Lesson) -> dict[str, torch.nn.Parameter]:
        from fivefold.techniques._shared.masks import empty

        every = dict(lesson.module.named_parameters())
        lesson.extra["masks"] = empty(every) if self.mode == "D" else {}
        return every

    def ready(self, lesson: Lesson, loss: Callable[[Any], torch.Tensor], batches: Callable[[int], Any]) -> None:
        from fivefold.techniques._shared.masks import fill_largest

        if self.mode == "D":
            fisher = _fisher(lesson.trained, loss, [batches(step) for step in range(self.batches)])
            total = sum(p.numel() for p in lesson.trained.values())
            fill_largest(lesson.extra["masks"], fisher.__getitem__, max(1, round(self.share * total)))

    def gradients(self, lesson: Lesson, step: int) -> None:
        if self.mode == "D":
            from fivefold.techniques._shared.masks import apply

            apply(lesson.trained, lesson.extra["masks"])
        else:
            _thin(lesson.trained, self.share, lesson.plan.seed, step)

    def buffers(self, lesson: Lesson) -> Mapping[str, torch.Tensor]:
        masks: Mapping[str, torch.Tensor] = lesson.extra["masks"]
        return masks

    def result(self, lesson: Lesson, value: Callable[[str], torch.Tensor]) -> Delta:
        from fivefold.techniques._shared.masks import learned
        from fivefold.training.delta import Delta

        if self.mode == "D":
            return learned(lesson, lesson.extra["masks"], value)
        return Delta(weights={name: partial(value, name) for name in lesson.trained})

    def numbers(self, lesson: Lesson) -> int:
        from fivefold.techniques._shared.masks import chosen

        return chosen(lesson.extra["masks"]) if self.mode == "D" else super().numbers(lesson)

    def covered(self, lesson: Lesson) -> str:
        if self.mode == "D":
            return f"of {super().numbers(lesson):,}, those with the most Fisher information over {self.batches} steps"
        return f"{self.share:.0%} of them in each step"


def _fisher(
    parameters: Mapping[str, torch.nn.Parameter], loss: Callable[[Any], torch.Tensor], steps: list[Any]
) -> dict[str, torch.Tensor]:
    """The mean over steps of the squared gradient, float32; a step is a list of batches with their shares."""
    import torch

    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    for step in steps:
        for batch, share in step:
            (loss(batch) * share).backward()
        for name, p in parameters.items():
            if p.grad is not None:
                wide = p.grad.float()
                total[name].addcmul_(wide, wide, value=1 / len(steps))
                p.grad = None
    return total


def _thin(parameters: Mapping[str, torch.nn.Parameter], share: float, seed: int, step: int) -> None:
    """Each gradient times Bernoulli(share) / share, in place; the draws depend on `seed` and `step` only."""
    import numpy as np
    import torch

    start = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    draw = torch.Generator().manual_seed(int(start))
    for p in parameters.values():
        mask = torch.empty(p.shape, dtype=torch.bool).bernoulli_(share, generator=draw)
        if p.grad is not None:
            p.grad.mul_(mask.to(p.grad.device)).div_(share)
