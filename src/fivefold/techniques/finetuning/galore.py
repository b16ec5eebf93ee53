"""GaLore: Adam runs in the few directions that carry most of each matrix's gradient.

    every `every` steps   B = leading `rank` left singular vectors of G      (shorter side m, rank)
    every step            R = B' G        N = Adam(R)        W <- W - rate * scale * B N

For a matrix whose longer side is n, state is B and the two averages of R: rank (m + 2 n) numbers where AdamW keeps
2 m n. The gradient itself is whole, so together with an update inside the backward pass only one of them is held. All
weights can still change: other directions are taken up when B is made again. Vectors, and matrices whose shorter side
is at most `rank`, get plain AdamW.

B comes from a randomised subspace iteration whose start depends on the step and the shape alone, so a resumed run
finds the same one. Averages are not rotated when B changes, as in the paper.

It does not help when m is small or `rank` near it (the state is then no smaller), nor beside an adapter. Choosing B
costs a few products of the size of one backward pass.

Source: Zhao et al., arXiv 2403.03507; the iteration is Halko et al., arXiv 0909.4061.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from fivefold.model import TrainPlan
from fivefold.space import Fixed, Range, Search
from fivefold.training.method import Update, rate_for

if TYPE_CHECKING:
    from fivefold.training.optimizer import Optimizer


@dataclass(frozen=True, kw_only=True)
class Galore(Update):

    rank: Annotated[int, Range(1, 4096, log=True), Search(32, 128)] = 128
    """Directions of each matrix in which Adam runs."""
    every: Annotated[int, Range(1, 100_000, log=True), Fixed()] = 200
    """Steps after which the directions are chosen again."""
    scale: Annotated[float, Range(1e-3, 100, log=True), Fixed()] = 1.0
    """Factor of the update of projected matrices; 1: what Adam would do in these directions."""
    rate: Annotated[float, Range(0, 1e-1), Fixed()] = 0.0
    """Peak learning rate; 0: that of what is trained, 5e-5 where the recipe does not say what."""

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate or rate_for(plan, 5e-5))

    def optimizer(self, plan: TrainPlan) -> Optimizer:
        from fivefold.training.optimizers.galore import GaLore

        return GaLore(rank=self.rank, every=self.every, scale=self.scale)
