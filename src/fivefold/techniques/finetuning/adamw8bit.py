"""8-bit AdamW: both averages of AdamW are stored in 8 bits, each block of 2,048 with a scale of its own.

    code = nearest of 256 values to x / max |x| of the block          x = value[code] * max |x|

The 256 values are a dynamic tree: seven decades from 1 down to 10^-6, the largest cut into 64 parts on either side of 0
(128 for the average square, which has no sign), each further one into half as many. What is close to the block's
largest number is so stored to about 1 %, and what is a millionth of it is not lost. The update itself is computed in
float32.

    bytes per weight     AdamW 8          here 2 + 8 / 2048

A square that is not 0 is never stored as 0, so no mean is divided by nothing. Tensors below 4,096 numbers keep float32
averages. It does not help where the averages are a small part of memory: beside an adapter, or where one block of
layers is trained at a time.

Source: Dettmers et al., arXiv 2110.02861.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from fivefold.model import TrainPlan
from fivefold.space import Fixed, Range
from fivefold.training.method import Update, rate_for

if TYPE_CHECKING:
    from fivefold.training.optimizer import Optimizer


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(Update):
    by_number = True

    rate: Annotated[float, Range(0, 1e-1), Fixed()] = 0.0
    """Peak learning rate; 0: that of what is trained, 5e-5 where the recipe does not say what."""

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate or rate_for(plan, 5e-5))

    def optimizer(self, plan: TrainPlan) -> Optimizer:
        from fivefold.training.optimizers.adamw8bit import AdamW8bit

        return AdamW8bit()
