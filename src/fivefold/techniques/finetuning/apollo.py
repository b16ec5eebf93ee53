"""APOLLO: plain gradient descent whose channels are scaled as Adam would, judged in a small random space.

    R = P' G        P Gaussian (shorter side m, rank), drawn again every `every` steps
    s = |Adam(R)| / |R|   per channel of the longer side (mode "tensor": one number for the matrix)
    W <- W - rate * scale * sqrt(m / rank) * s * G

A random projection keeps lengths on average, and Adam's effect on a channel is mostly a change of its length, so two
averages of rank x n numbers do what 2 m n do in Adam; P is drawn from the step and the shape and not kept. An update
may be at most 1 % longer than the one before, which takes the place of momentum against spikes.

`apollo(mode="tensor", rank=1)` is the paper's Mini: 2 n + 1 numbers of state for a matrix, about what plain gradient
descent needs. The factor sqrt(m / rank) makes up for the shorter Adam(R), so that a rate means what it means for AdamW.
Vectors, and matrices whose shorter side is at most `rank`, get plain AdamW.

It does not help beside an adapter, whose matrices are thin already, nor when `rank` is near m.

Source: Zhu et al., arXiv 2412.05270.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from fivefold.model import TrainPlan
from fivefold.space import Fixed, Range, Search
from fivefold.training.method import Update, rate_for

if TYPE_CHECKING:
    from fivefold.training.optimizer import Optimizer


@dataclass(frozen=True, kw_only=True)
class Apollo(Update):
    headline = "APOLLO-Mini at rank 1: SGD-level memory at >= AdamW quality"
    by_number = True

    mode: Literal["channel", "tensor"] = "channel"
    """What is scaled by one number: a channel of the longer side, or the whole matrix."""
    rank: Annotated[int, Range(1, 4096, log=True), Search(1, 32, 128)] = 32
    """Random directions in which Adam's averages are kept."""
    every: Annotated[int, Range(1, 100_000, log=True), Fixed()] = 200
    """Steps after which the directions are drawn again."""
    scale: Annotated[float, Range(1e-3, 100, log=True), Fixed()] = 1.0
    """Factor of the update of projected matrices; 1: about as long as Adam's."""
    rate: Annotated[float, Range(0, 1e-1), Fixed()] = 0.0
    """Peak learning rate; 0: that of what is trained, 5e-5 where the recipe does not say what."""

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate or rate_for(plan, 5e-5))

    def optimizer(self, plan: TrainPlan) -> Optimizer:
        from fivefold.training.optimizers.apollo import Apollo

        return Apollo(rank=self.rank, every=self.every, scale=self.scale, by_channel=self.mode == "channel")
