"""Storage type of the key-value cache.

Attention keeps the keys and values of every earlier token: 2 x layers x key-value heads x head width elements per
token of context. Each new token reads all of it, so at long context the cache, not the weights, is what memory has to
feed. q8_0 (8.5 bits) takes 53 % of the 16-bit cache and q4_0 (4.5 bits) 28 %; blocks of 32 elements share a scale.

Lowers memory, most where contexts are long or many requests run at once. At short context it saves nothing that can
be seen, and packing and unpacking cost arithmetic. q8_0 hardly changes an answer; q4_0 hurts small models.

Source: KIVI, arXiv 2402.02750, for the idea; the types are llama.cpp's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from fivefold.errors import Misfit
from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Search
from fivefold.techniques._shared.gguf_types import block, fits
from fivefold.techniques._shared.serving import engine_name, limit, planned_format, refuse_unknown

Type = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]


@dataclass(frozen=True, kw_only=True)
class KvCache(Technique):
    needs = frozenset({Trait.FULL_CACHE})
    breaks = frozenset({Trait.FULL_CACHE})
    lowers = {"memory": "direct", "energy": "indirect", "compute": "indirect"}
    may_raise = ("compute",)
    runtime = True
    perturbation = 0.5

    type: Annotated[Type, Search("f16", "q8_0", "q4_0")]
    """Storage type of keys and values."""

    def check(self, model: Model) -> None:
        if planned_format(model) == "safetensors":
            raise Misfit(
                f"{engine_name(model)} keeps the cache in its arithmetic's type; remove kv_cache or add gguf(type=...)"
            )
        refuse_unknown(str(self), self.type, "caches of", limit(model, "CACHE_TYPES"), engine_name(model))
        if not fits(self.type, model.blueprint.head_dim):
            raise Misfit(
                f"{self} does not fit: heads of {model.blueprint.head_dim} elements are not a multiple of"
                f' {block(self.type)}; choose "f16" or "bf16"'
            )

    def apply(self, model: Model) -> Model:
        return model.but(run=replace(model.run, cache_type=self.type))
