"""Arithmetic of the torch engine.

bfloat16 keeps float32's 8-bit exponent and shortens the fraction from 23 bits to 7: half the bytes to read per token,
and 2 to 3 times the matrix rate on processors with bf16 instructions. Numbers are rounded by a relative 2^-9 at most
and products summed in float32, so the log-loss moves in the third decimal (3.4177 to 3.4197 on SmolLM2-135M).

Lowers memory, time and energy in torch. On a processor without bf16 instructions it is emulated and slower. Other
engines take their arithmetic from the storage type of the file; there this technique is refused.

Source: A Study of BFLOAT16 for Deep Learning Training, arXiv 1905.12322.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fivefold.errors import Misfit
from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.techniques._shared.serving import engine_name, limit, refuse_unknown


@dataclass(frozen=True, kw_only=True)
class Dtype(Technique):
    needs = frozenset({Trait.TORCH_GRAPH})
    lowers = {"memory": "direct", "compute": "direct", "energy": "direct", "money": "indirect"}
    may_raise = ("compute",)
    runtime = True
    perturbation = 0.1

    type: Literal["float32", "bfloat16"]
    """Number format of weights and products."""

    def check(self, model: Model) -> None:
        if engine_name(model) != "torch":
            raise Misfit(f"{self} sets torch's arithmetic, and this recipe runs in {engine_name(model)}; remove dtype")
        refuse_unknown(str(self), self.type, "arithmetic in", limit(model, "DTYPES"), "torch")

    def apply(self, model: Model) -> Model:
        return model.but(run=replace(model.run, dtype=self.type))
