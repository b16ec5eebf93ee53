"""AdaLomo: LOMO with a step size per weight, from second moments kept by row and by column only.

    r <- b r + (1 - b) mean over columns of g^2       c <- b c + (1 - b) mean over rows of g^2      b = 1 - t^-0.8
    u  = g / sqrt(r c' / mean(r))                     w <- w - rate * max(10^-3, rms(w)) * u / max(1, rms(u))

r c' / mean(r) is the closest matrix of rank one to the average squares, so a matrix of m x n needs m + n numbers where
Adam keeps 2 m n. Each tensor's update is brought to a length of rms 1 and then measured by the tensor's own size
(grouped normalisation), so the rate is a relative change and no norm over all gradients is needed: the update runs
inside the backward pass.

There is no momentum, so it wants larger batches than AdamW. It does not help beside an adapter, whose averages are
small anyway; there, matrices that begin at 0 start slowly, and the rate is set a hundred times higher.

Source: Lv et al., arXiv 2310.10195; the factored moments are Adafactor's, Shazeer & Stern, arXiv 1804.04235.
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
class AdaLomo(Update):
    by_number = True

    rate: Annotated[float, Range(0, 10), Fixed()] = 0.0
    """Peak learning rate, as a share of each tensor's size; 0: 5e-4, and 5e-2 for numbers beside the model's own."""

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate or rate_for(plan, 5e-4, 5e-2))

    def optimizer(self, plan: TrainPlan) -> Optimizer:
        from fivefold.training.optimizers.lomo import AdaLomo

        return AdaLomo()
