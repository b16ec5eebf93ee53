"""BAdam: one block of layers is trained at a time; only its gradients, averages and float32 halves are in memory.

    blocks     every decoder layer, and what lies outside the layers (embedding, last norm, head): D + 1 of them
    a visit    `every` steps of Adam on one block, from fresh averages; a cycle visits each block once

    bytes for M weights     full AdamW 2 M + 2 M + 8 M and gradients      here 2 M + (8 + 2 + 2) M / D

The backward pass ends at the active layer, and no other layer's weights get a gradient, so a step is cheaper too. With
held="block" weights rest as bfloat16 and are float32 (two halves) while their block is active. At the end of a visit
they are rounded, up with the probability of what is lost: a visit moves a weight by less than bfloat16 resolves, and
rounding to the nearest would take most of it back. A model stored in float32 is rounded when training begins.

`every` x blocks steps are needed until all have been trained once. It does not help in runs shorter than that, nor
where one block (a large embedding) is most of the model, nor beside an adapter.

Source: Luo et al., arXiv 2404.02827.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from fivefold.model import TrainPlan
from fivefold.space import Fixed, Range, Search
from fivefold.training.method import Methods, Update, rate_for

if TYPE_CHECKING:
    from fivefold.training.optimizer import Optimizer


@dataclass(frozen=True, kw_only=True)
class Badam(Update):
    headline = "Llama3-8B in 23.5 GB vs 144+; MT-bench above LoRA"
    passes = 1.6
    every: Annotated[int, Range(1, 100_000, log=True), Search(5, 20, 50)] = 10
    """Steps of one visit."""
    order: Annotated[Literal["random", "ascending"], Fixed()] = "random"
    """Order of the blocks in a cycle."""
    held: Annotated[Literal["block", "split"], Fixed()] = "block"
    """The lower halves of float32 weights are kept of the active block, or ("split") of all weights."""
    rate: Annotated[float, Range(0, 1e-1), Fixed()] = 0.0
    """Peak learning rate; 0: that of what is trained, 5e-5 where the recipe does not say what."""

    def edited(self, plan: TrainPlan) -> TrainPlan:
        held = "split" if self.held == "split" else "nearest"
        return replace(plan, learning_rate=self.rate or rate_for(plan, 5e-5), held=held)  # type: ignore[arg-type]

    def optimizer(self, plan: TrainPlan) -> Optimizer:
        import torch

        from fivefold.training.module import computing_dtype
        from fivefold.training.optimizers.badam import BAdam

        adaptation = Methods.of(plan).adaptation
        whole = adaptation is None or adaptation.whole
        halves = self.held == "block" and whole and computing_dtype(plan.dtype) == torch.bfloat16
        return BAdam(every=self.every, order=self.order, seed=plan.seed, halves=halves)
