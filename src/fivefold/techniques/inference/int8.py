"""Weights of linear layers as 8-bit whole numbers for the torch engine; activations stay in floating point.

Every row has one scale: q_ij = round(w_ij / s_i) with s_i = max_j |w_ij| / 127, and w'_ij = s_i q_ij. The error is at
most s_i / 2 per weight, a relative 0.3 % or so for bell-shaped rows, which changes answers hardly at all. A weight
costs 1 byte and 2 / columns for its scale, against 4 or 2.

Lowers memory, file and, where reading weights is the bottleneck, time per token of the torch engine. Long prompts are
arithmetic and gain nothing. On a CPU llama.cpp's q8_0 is usually faster: this is for families that only torch runs.

Source: LLM.int8(), arXiv 2208.07339, for rows as the unit of scaling; kernels: PyTorch's weight-only int8 product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.techniques._shared.packing import linear_shapes, packed


@dataclass(frozen=True, kw_only=True)
class Int8(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.FLOAT_WEIGHTS, Trait.TRAINABLE})
    lowers = {"memory": "direct", "network": "direct", "compute": "indirect", "energy": "indirect", "money": "indirect"}
    may_raise = ("compute",)
    perturbation = 4.0

    head: Literal["keep", "int8"] = "keep"
    """The token embedding and the output head: as they are, or in 8 bits too."""

    def check(self, model: Model) -> None:
        linear_shapes(model, str(self))

    def plan(self, model: Model) -> Model:
        return model.but(export=model.export.storing(8.0, self.head))

    def apply(self, model: Model) -> Model:
        shapes, head = linear_shapes(model, str(self))
        chosen = dict.fromkeys([*shapes, *(head if self.head == "int8" else [])], (8, 0))
        rest = "in 8 bits" if self.head == "int8" else "kept"
        said = f"int8: {len(shapes)} of {len(shapes)} linear layers; embedding and head {rest}"
        return packed(model, "int8", chosen).covered(said)
