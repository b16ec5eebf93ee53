"""Number of threads the engine computes with.

Decoding one token reads every weight once, so beyond the thread that saturates memory bandwidth another one only adds
barriers; prefill is arithmetic and scales further. On a shared machine fewer threads also draw less power: the best
count depends on workload and machine, which is why it is searched. It changes no weight and no answer.

Source: the roofline model (Williams, Waterman, Patterson, CACM 2009).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Range, Search


@dataclass(frozen=True, kw_only=True)
class Threads(Technique):
    needs = frozenset({Trait.OPEN_THREADS})
    breaks = frozenset({Trait.OPEN_THREADS})
    lowers = {"compute": "direct", "energy": "direct"}
    runtime = True
    perturbation = 0.0

    count: Annotated[int, Range(1, 512), Search(1, 2)]
    """Threads for prefill and decode."""

    def apply(self, model: Model) -> Model:
        return model.but(run=replace(model.run, threads=self.count))
