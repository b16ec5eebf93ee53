"""Activation checkpointing: a layer keeps its input only, and its forward pass is run again when its turn comes back.

    kept per position     a layer 2 d + 2 h + 2 k + 2 f numbers (`training.memory`)       a checkpointed one d

With all layers checkpointed the activations of a model are those of one layer plus a width per layer, for one more
forward pass: a third more arithmetic where weights are trained, half more beside frozen ones. The recomputation is the
same function of the same numbers, so gradients are bit for bit what they were.

`layers` < 1 checkpoints the first ones: by the time they are run again, what the later ones kept is gone.

It helps where activations are most of the memory: long sequences, many positions at once. It does not help with small
batches, where weights and averages are most of it; fewer positions at once save the same memory for less arithmetic.

Source: Chen et al., arXiv 1604.06174.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fivefold.model import Blueprint
from fivefold.space import Range, Search
from fivefold.training.method import Lesson, Saving


@dataclass(frozen=True, kw_only=True)
class CheckpointActivations(Saving):
    may_raise = ("compute", "energy", "money")

    layers: Annotated[float, Range(0, 1), Search(0.5, 1.0)] = 1.0
    """Share of the layers that is checkpointed, from the first on."""

    def count(self, depth: int) -> int:
        return round(self.layers * depth)

    def kept_layers(self, blueprint: Blueprint) -> float:
        return float(blueprint.layers - self.count(blueprint.layers))

    def install(self, lesson: Lesson) -> None:
        from fivefold.techniques._shared.modules import layers

        parts = layers(lesson.module)
        for layer in parts[: self.count(len(parts))]:
            layer.forward = partial(_again, layer.forward)


def _again(forward: Any, *given: Any, **named: Any) -> Any:
    import torch
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(*given, **named)
    return checkpoint(forward, *given, use_reentrant=False, **named)
