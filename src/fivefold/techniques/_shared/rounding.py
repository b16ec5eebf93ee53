"""What techniques that round every linear layer to a grid of groups have in common: their fields and their refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, cast

from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Search
from fivefold.techniques._shared.targets import Breaks, Target, Wish


@dataclass(frozen=True, kw_only=True)
class Rounding(Technique):
    """A subclass also says whether its grid is `symmetric`."""

    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    breaks = Breaks()
    lowers = {"memory": "direct", "network": "direct", "compute": "indirect", "energy": "indirect", "money": "indirect"}
    may_raise = ("compute",)
    perturbation = 5.0

    bits: Literal[2, 3, 4, 8] = 4
    """Bits per code."""
    group: Annotated[Literal[32, 64, 128, 0], Search(32, 64)] = 32
    """Neighbouring weights that share a scale; 0 is the whole row."""
    into: Literal["torch", "gguf"] = "torch"
    """The engine that will run the codes: torch with a kernel of its own, or llama.cpp (4 and 8 bits, groups of 32)."""
    head: Literal["keep", "int8"] = "keep"
    """The token embedding and the output head: as they are (f16 in gguf), or in 8 bits."""

    @property
    def target(self) -> Target:
        return Target(cast(Wish, self))

    def check(self, model: Model) -> None:
        self.target.check(model)

    def plan(self, model: Model) -> Model:
        return self.target.plan(model)

    def effort_once(self, model: Model) -> float:
        return 0.0
