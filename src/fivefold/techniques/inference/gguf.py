"""Weights in llama.cpp's block formats: 1.6 to 32 bits per weight, read and multiplied as they are stored.

Decoding one token reads every weight once, so its time is at best bytes / bandwidth: a weight of 4.5 bits instead of
16 lets memory feed 3.6 times as many of them. A block of n weights shares a scale d (and for the _1 and K types a
minimum m): w = d q + m with q of k bits, so a block costs k n / 8 bytes and its scales. q8_0 rounds to 8 bits in
blocks of 32 (8.5 bits per weight); q4_0, 4.5; iq4_nl has 16 unevenly spaced levels; K types put 8 or 16 small blocks
under one scale of 256; i-quants below 4 bits choose from a table of grid points. The rounding error minimised is
sum_j s_j (w_j - w'_j)^2 with s_j = the mean square of input j on calibration text (the importance), if `importance`
is on.

Lowers memory, network bytes and, where memory is the bottleneck, decoding time and energy. Prefill is arithmetic and
may become slower than with 16-bit weights. Small models lose much below 5 bits. A row must be a multiple of the block
wide: what does not fit is refused, or written in the type you name as `fallback`, and reported.

Source: llama.cpp, ggml-quants.c; importance matrices: llama.cpp pull request 4861.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from fivefold.errors import Misfit
from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search
from fivefold.techniques._shared.gguf_types import IGNORES_IMPORTANCE, NEEDS_IMPORTANCE, matrices, resolve, sentence

Type = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_1", "q5_k", "q5_0", "q4_1", "q4_k", "q4_0", "iq4_nl", "iq4_xs", "mxfp4",
    "q3_k", "iq3_s", "iq3_xxs", "q2_k", "iq2_s", "iq2_xs", "tq2_0", "iq2_xxs", "iq1_m", "tq1_0", "iq1_s",
]
Embedding = Literal[
    "same", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_1", "q5_k", "q5_0", "q4_1", "q4_k", "q4_0", "iq4_nl", "iq4_xs",
]


@dataclass(frozen=True, kw_only=True)
class Gguf(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH})
    lowers = {"memory": "direct", "network": "direct", "compute": "indirect", "energy": "indirect", "money": "indirect"}
    may_raise = ("compute",)
    perturbation = 4.0

    type: Annotated[Type, Search("q8_0", "q6_k", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "q4_k")]
    """Storage type of the matrices."""
    embedding: Annotated[Embedding, Search("same", "q8_0", "q5_0")] = "same"
    """Storage type of the token embedding, which is also the output head when the two are tied."""
    fallback: Annotated[Literal["refuse", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"], Fixed()] = "refuse"
    """Type for matrices whose width is not a multiple of the block; "refuse" stops before any work."""
    importance: bool = True
    """Weigh rounding errors by what flows through each column, measured on calibration text."""
    windows: Annotated[int, Range(1, 4096), Fixed()] = 8
    """Calibration windows of 512 tokens."""

    def check(self, model: Model) -> None:
        self._types(model)
        poor = sorted({self.type, self._embedding} & NEEDS_IMPORTANCE)
        if poor and not self.importance:
            raise Misfit(
                f"{poor[0]} needs to know which columns matter; set importance=True or choose a type of 3 bits or more"
            )

    def plan(self, model: Model) -> Model:
        export = replace(model.export, format="gguf", default=self.type, embedding=self._embedding, types={})
        departures = {
            name: kind for name, kind in self._types(model).items()
            if kind != (export.embedding if name == "token_embd.weight" else export.default)
        }
        return model.but(export=replace(export, types=departures))

    def apply(self, model: Model) -> Model:
        types = self._types(model)
        said = f"gguf {sentence(matrices(model), types, self.type, self._embedding)}"
        model = self.plan(model)
        if self.importance and not set(types.values()) <= IGNORES_IMPORTANCE:
            from fivefold.techniques._shared.importance import importance_file

            file, tokens = importance_file(model, self.windows)
            model = model.but(export=replace(model.export, importance=file))
            said += f"; importance from {tokens} tokens"
        return model.covered(said)

    @property
    def _embedding(self) -> str:
        return self.type if self.embedding == "same" else self.embedding

    def _types(self, model: Model) -> dict[str, str]:
        fallback = None if self.fallback == "refuse" else self.fallback
        return resolve(matrices(model), self.type, self._embedding, fallback, str(self))
