"""LOMO: plain gradient descent inside the backward pass: no averages, and one gradient at a time.

    w <- w - rate * g

Each parameter is updated as soon as its gradient is complete, and the gradient is dropped, so beside the weights only
the largest tensor's gradient is held: AdamW's 8 bytes per weight of averages and all other gradients are gone. Steps
are kept from exploding by the norm of the step before (`training.loop`); one pass then does what two would.

Every weight gets the same rate, where Adam gives each its own: it learns more slowly, wants a rate a thousand times
Adam's and reacts strongly to it. It does not help where memory is left for averages (`adalomo` and `apollo` need nearly
as little), nor beside an adapter, whose gradients and averages are small anyway.

Source: Lv et al., arXiv 2306.09782.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from fivefold.model import TrainPlan
from fivefold.space import Fixed, Range
from fivefold.training.method import Update

if TYPE_CHECKING:
    from fivefold.training.optimizer import Optimizer


@dataclass(frozen=True, kw_only=True)
class Lomo(Update):
    headline = "memory 10.8% of standard AdamW's; 65B on 8x RTX3090"
    by_number = True

    rate: Annotated[float, Range(1e-7, 10, log=True), Fixed()] = 0.03
    """Peak learning rate: the whole step is no longer than it, since the gradient's norm is held at 1."""

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate)

    def optimizer(self, plan: TrainPlan) -> Optimizer:
        from fivefold.training.optimizers.lomo import Lomo

        return Lomo()
