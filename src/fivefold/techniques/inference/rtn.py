"""Round to nearest: every weight becomes the closest of 4 to 256 evenly spaced values of its group of neighbours.

A group of `group` columns of one row shares a scale s and, unless symmetric, an offset z, both in half precision:

    w' = s q + z      or symmetric    w' = s (q - 2^(bits-1))        q = 0 ... 2^bits - 1

With scales="range" the extremes of the group are the ends of the grid, so no weight is off by more than s / 2; "fit"
chooses scale and offset for the least squared error of the group instead, and may clip an outlier. A weight costs bits
+ 32 / group (symmetric: + 16 / group) bits. No text is looked at and a matrix is in memory at a time.

Lowers memory, file and, where reading weights is the bottleneck, time per token: into="torch" keeps the codes packed
and multiplies them as they lie, into="gguf" writes the llama.cpp type that is exactly this grid. It is the baseline of
the others: at 8 bits nothing is better, at 4 a small model is hurt, at 3 and 2 most are useless without gptq.

Source: the baseline of GPTQ (Frantar et al., arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Search
from fivefold.techniques._shared.targets import Breaks, Target


@dataclass(frozen=True, kw_only=True)
class Rtn(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    breaks = Breaks()
    lowers = {"memory": "direct", "network": "direct", "compute": "indirect", "energy": "indirect", "money": "indirect"}
    may_raise = ("compute",)
    perturbation = 5.0

    bits: Literal[2, 3, 4, 8] = 4
    """Bits per code."""
    group: Annotated[Literal[32, 64, 128, 0], Search(32, 64)] = 32
    """Neighbouring weights that share a scale; 0 is the whole row."""
    symmetric: bool = False
    """No offset: zero is a value of the grid, and a group costs 16 bits less."""
    scales: Literal["range", "fit"] = "range"
    """Whether a grid spans the extremes of its group, or is fitted for the least squared error."""
    into: Literal["torch", "gguf"] = "torch"
    """The engine that will run the codes: torch with a kernel of its own, or llama.cpp (4 and 8 bits, groups of 32)."""
    head: Literal["keep", "int8"] = "keep"
    """The token embedding and the output head: as they are (f16 in gguf), or in 8 bits."""

    def check(self, model: Model) -> None:
        Target(self).check(model)

    def plan(self, model: Model) -> Model:
        return Target(self).plan(model)

    def effort_once(self, model: Model) -> float:
        return 0.0

    def effort(self, model: Model) -> float:
        return 1_000.0 * model.blueprint.parameters

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.grids import round_to
        from fivefold.techniques._shared.targets import matrices_of

        target = Target(self)
        shapes = target.check(model)
        solved = ((n, round_to(w, target.grid, self.scales)) for n, w in matrices_of(model, shapes))
        return target.write(model, "rtn", solved).covered(f"rtn: {target.said(len(shapes), len(shapes))}")
