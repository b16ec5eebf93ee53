"""Arithmetic of the engine: float32 or bfloat16.

bfloat16 keeps float32's 8-bit exponent and shortens the fraction from 23 bits to 7: half the bytes to read per token,
and 2 to 3 times the matrix rate on processors with bf16 instructions. Numbers are rounded by a relative 2^-9 at most
and products summed in float32, so the log-loss moves in the third decimal (3.4177 to 3.4197 on SmolLM2-135M).

In torch it lowers memory, time and energy. OpenVINO keeps the weights as the file stores them and computes in this
type. llama.cpp's arithmetic follows the storage type of the file; there this technique is refused. On a processor
without bf16 instructions bfloat16 is emulated and slower.

Source: A Study of BFLOAT16 for Deep Learning Training, arXiv 1905.12322.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fivefold.errors import Misfit
from fivefold.model import Model
from fivefold.recipe import Technique
from fivefold.techniques._shared.serving import engine_name


@dataclass(frozen=True, kw_only=True)
class Dtype(Technique):
    lowers = {"memory": "direct", "compute": "direct", "energy": "direct", "money": "indirect"}
    may_raise = ("compute",)
    runtime = True
    perturbation = 0.1

    type: Literal["float32", "bfloat16"]
    """Number format of the products, and in torch of the weights."""

    def check(self, model: Model) -> None:
        if engine_name(model) == "llama.cpp":
            raise Misfit(
                f"{self} does not fit: llama.cpp computes in the types of its file; remove dtype or change the engine"
            )

    def apply(self, model: Model) -> Model:
        return model.but(run=replace(model.run, dtype=self.type))
