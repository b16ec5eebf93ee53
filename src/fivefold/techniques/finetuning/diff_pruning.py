"""Diff pruning: learn a difference for every weight, and behind a random gate whether the difference is worth having.

    W = W0 + z * w        loss + strength * mean P(z > 0)        z a hard-concrete gate

    1   w and the gates are learned together for a part of the steps; the penalty closes gates that lower the loss by
        less than they cost (`strength` nats is the price of all of them open)
    2   the gates are fixed, and the difference z * w is cut to the target share by magnitude
    3   what is left is trained on for the rest of the steps, without gates

Trained are all linear layers inside the decoder's layers, number by number (the paper's unstructured form; its groups
of one gate per matrix are not made). Each phase has a fresh optimiser and its own schedule; only held-out scores of the
last count. The result is the parent plus that share of numbers, at 8 bytes each.

It saves what is shipped and kept, nothing while training, where it is the hungriest of all: per weight of those layers
float32 w and gate (8 bytes), their gradients (8), AdamW's averages (16), and one byte for the mask, 33 beside the
weights. It does not help in a short run: gates need some hundred steps to close.

Sources: Guo et al., arXiv 2012.07463; Louizos et al., arXiv 1712.01312.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

from fivefold.model import Blueprint, Model, TrainPlan
from fivefold.space import Fixed, Range, Search
from fivefold.training.method import Adaptation, Lesson, Shapes, boundary, linear_shapes

if TYPE_CHECKING:
    import torch

    from fivefold.training.delta import Delta
    from fivefold.training.optimizer import Optimizer

KINDS = ("change", "openness")


@dataclass(frozen=True, kw_only=True)
class DiffPruning(Adaptation):
    blocks = False
    lowers = {"network": "direct"}
    may_raise = ("quality", "memory", "compute")
    passes = 3.0
    masks = True
    perturbation = 3.0

    share: Annotated[float, Range(1e-6, 0.5, log=True), Search(0.005, 0.05)] = 0.005
    """Share of the linear layers' weights that may differ from the parent's in the end."""
    strength: Annotated[float, Range(0.0, 1e4), Fixed()] = 10.0
    """Price in nats of all gates open."""
    openness: Annotated[float, Range(-5.0, 10.0), Fixed()] = 5.0
    """Where gates begin, in logits: 5 is open in 99.3 % of draws."""
    first: Annotated[float, Range(0.05, 0.95), Fixed()] = 0.5
    """Share of the steps with gates."""
    rate: Annotated[float, Range(1e-7, 1e-1, log=True), Fixed()] = 1e-4
    """Peak learning rate of w."""
    gate_rate: Annotated[float, Range(1e-6, 1.0, log=True), Fixed()] = 0.1
    """Peak learning rate of the gates' logits."""

    def check(self, model: Model) -> None:
        super().check(model)
        if model.train.steps:
            boundary(self.name, model.train, self.first)

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate)

    def shapes(self, blueprint: Blueprint) -> Shapes:
        return {f"{name}.{part}": shape for name, shape in linear_shapes(blueprint).items()
                for part in KINDS}

    def weight_bytes(self, blueprint: Blueprint, element: int) -> float:
        return super().weight_bytes(blueprint, element) + sum(map(math.prod, linear_shapes(blueprint).values()))

    def default_optimizer(self) -> Optimizer:
        """The penalty's gradient of one gate of a large model lies below AdamW's usual eps."""
        from fivefold.training.adamw import AdamW

        return AdamW(eps=1e-14)

    def prepare(self, lesson: Lesson) -> dict[str, torch.nn.Parameter]:
        from fivefold.techniques._shared.gates import Draws, install
        from fivefold.techniques._shared.masks import empty
        from fivefold.techniques._shared.modules import linears

        draws = Draws.of(lesson.plan.seed)
        parts = dict(linears(lesson.module))
        for layer, part in enumerate(parts.values()):
            install(part, layer, draws, self.openness)
        lesson.extra |= {"draws": draws, "parts": parts, "masks": empty({n: p.change for n, p in parts.items()})}
        return {f"{name}.{kind}": getattr(part, kind) for name, part in parts.items() for kind in KINDS}

    def rates(self, lesson: Lesson) -> Mapping[str, float]:
        rate = self.gate_rate / lesson.plan.learning_rate
        return {f"{name}.openness": rate for name in lesson.extra["parts"]}

    def phases(self, lesson: Lesson) -> Sequence[int]:
        return (boundary(self.name, lesson.plan, self.first),)

    def penalty(self, lesson: Lesson, step: int) -> torch.Tensor | None:
        from fivefold.techniques._shared.gates import expected_open

        parts = lesson.extra["parts"].values()
        if lesson.extra["draws"].fixed or not self.strength:
            return None
        total: torch.Tensor = sum(expected_open(part.openness) for part in parts)
        return total * (self.strength / sum(part.openness.numel() for part in parts))

    def gradients(self, lesson: Lesson, step: int) -> None:
        if lesson.extra["draws"].fixed:
            from fivefold.techniques._shared.masks import apply

            apply({n: part.change for n, part in lesson.extra["parts"].items()}, lesson.extra["masks"])

    def stepped(self, lesson: Lesson, step: int) -> None:
        lesson.extra["draws"].step.fill_(step)

    def anew(self, lesson: Lesson, value: Callable[[str], torch.Tensor]) -> Iterable[str]:
        """The cut: w becomes z * w where that is largest, and 0 elsewhere."""
        from fivefold.techniques._shared.gates import gate
        from fivefold.techniques._shared.masks import fill_largest

        parts, masks = lesson.extra["parts"], lesson.extra["masks"]
        for part in parts.values():
            part.change.data.mul_(gate(part.openness.data, None)[0])
        total = sum(mask.numel() for mask in masks.values())
        fill_largest(masks, lambda name: parts[name].change.data, max(1, round(self.share * total)))
        for name, part in parts.items():
            part.change.data.mul_(masks[name])
        lesson.extra["draws"].fixed.fill_(1)
        return ()

    def buffers(self, lesson: Lesson) -> Mapping[str, torch.Tensor]:
        draws = lesson.extra["draws"]
        return {"step": draws.step, "fixed": draws.fixed, **{f"mask/{n}": m for n, m in lesson.extra["masks"].items()}}

    def result(self, lesson: Lesson, value: Callable[[str], torch.Tensor]) -> Delta:
        from fivefold.training.delta import Delta
        from fivefold.training.run import stored_value

        def changed(name: str, mask: torch.Tensor) -> torch.Tensor:
            return stored_value(lesson, f"{name}.weight").addcmul_(value(f"{name}.change"), mask)

        weights = {f"{name}.weight": partial(changed, name, mask) for name, mask in lesson.extra["masks"].items()}
        return Delta(weights=weights, sparse=frozenset(weights))

    def numbers(self, lesson: Lesson) -> int:
        from fivefold.techniques._shared.masks import chosen

        return chosen(lesson.extra["masks"])

    def covered(self, lesson: Lesson) -> str:
        masks = lesson.extra["masks"]
        return f"of {sum(m.numel() for m in masks.values()):,} in {len(masks)} linear layers, by learned gates"
