"""Round to nearest: every weight becomes the closest of 4 to 256 evenly spaced values of its group of neighbours.

A group of `group` columns of one row shares a scale s and, unless symmetric, an offset z, both in half precision:

    w' = s q + z      or symmetric    w' = s (q - 2^(bits-1))        q = 0 ... 2^bits - 1

With scales="range" the grid spans the extremes of the group and zero, which is one of its values, so no weight is off
by more than s / 2; "fit" chooses scale and offset for the least squared error of the group, and may clip an outlier. A
weight costs bits + 32 / group (symmetric: + 16 / group) bits. No text is looked at and a matrix is in memory at a time.

Lowers memory, file and, where reading weights is the bottleneck, time per token: into="torch" keeps the codes packed
and multiplies them as they lie, into="gguf" writes the llama.cpp type that is exactly this grid. It is the baseline of
the others: at 8 bits nothing is better, at 4 a small model is hurt, at 3 and 2 most are useless without gptq.

Source: the baseline of GPTQ (Frantar et al., arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fivefold.model import Model
from fivefold.techniques._shared.rounding import Rounding


@dataclass(frozen=True, kw_only=True)
class Rtn(Rounding):
    symmetric: bool = False
    """No offset: zero is a value of the grid, and a group costs 16 bits less."""
    scales: Literal["range", "fit"] = "range"
    """Whether a grid spans the extremes of its group, or is fitted for the least squared error."""

    def effort(self, model: Model) -> float:
        return 1_000.0 * model.blueprint.parameters

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.grids import round_to
        from fivefold.techniques._shared.targets import matrices_of

        target = self.target
        shapes = target.check(model)
        solved = ((n, round_to(w, target.grid, self.scales)) for n, w in matrices_of(model, shapes))
        return target.write(model, "rtn", solved).covered(f"rtn: {target.said(len(shapes), len(shapes))}")
