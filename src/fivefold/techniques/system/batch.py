"""Requests decoded together.

One decoding pass reads every weight once, whether it advances one sequence or sixteen: the bytes per token fall as 1
/ batch until arithmetic (batch x 2 operations per weight) takes as long as the reading. From there on a larger batch
adds delay and no throughput. The batch at which the two meet is roughly (operations per second) / (2 x weights read
per second); on a few CPU cores it is small.

Lowers energy and money per token where there are requests to fill it; raises the cache memory, batch times over, and
the time each single request takes. It does nothing for one user at a time. It changes no weight, and answers only by
rounding.

Source: Orca (OSDI 2022) for batching at the granularity of one step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Range, Search


@dataclass(frozen=True, kw_only=True)
class Batch(Technique):
    needs = frozenset({Trait.OPEN_BATCH})
    breaks = frozenset({Trait.OPEN_BATCH})
    lowers = {"energy": "direct", "money": "direct", "compute": "indirect"}
    may_raise = ("memory", "compute")
    runtime = True
    perturbation = 0.0

    size: Annotated[int, Range(1, 1024), Search(1, 2, 4, 8, 16)]
    """Sequences per pass."""

    def apply(self, model: Model) -> Model:
        return model.but(run=replace(model.run, batch=self.size))
