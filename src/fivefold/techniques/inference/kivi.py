"""Key-value cache in 2, 4 or 8 bits for the torch engine: keys per channel, values per token, the newest tokens exact.

Keys have a few channels far larger than the rest, whatever the token, so a range per channel over a group of tokens
keeps them from widening everybody's steps; values have no such channels, and each is weighed by its own token. With
asymmetric codes q of b bits over a group of G neighbours,

    x' = scale q + zero,  scale = (max - min) / (2^b - 1),  |x' - x| <= scale / 2

an element takes b / 8 + 4 / G bytes (scale and zero are 16 bits): at G = 32, 3 bits instead of 32 or 16 at b = 2.
The newest `residual` tokens, and a group that is not full yet, stay exact, so a context no longer than residual + group
is not changed and not made smaller, and a quality measured on such texts says nothing about longer ones.

Lowers memory where contexts are long or many run at once. It saves no time here: every pass turns the packed
tokens of one layer at a time back into floats. Measured on SmolLM2-135M in float32 over 1,024 tokens with a residual
of 32: KL to the exact cache 0.003 at 4 bits and 0.15 at 2 (0.71 if keys too are packed per token), 5.6 KB per token
held at 2 bits instead of 46, and a token decoded at that length takes 1.2 times as long. A prompt is read in one pass
that sees it exactly, as in the paper; texts are scored as if decoded token by token. llama.cpp packs its cache itself:
see kv_cache.

Source: Liu et al., KIVI, arXiv 2402.02750.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from fivefold.engines._kivi_type import KiviType, unpackable
from fivefold.errors import Misfit
from fivefold.model import Model, Trait, read_config
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search
from fivefold.techniques._shared.serving import engine_name, planned_format


@dataclass(frozen=True, kw_only=True)
class Kivi(Technique):
    needs = frozenset({Trait.FULL_CACHE})
    breaks = frozenset({Trait.FULL_CACHE})
    lowers = {"memory": "direct"}
    may_raise = ("compute", "energy", "money")
    runtime = True
    headline = "2-bit cache: 2.6x less peak memory, 4x batch, 2.35-3.47x throughput"
    perturbation = 0.6

    bits: Annotated[Literal[2, 4, 8], Search(2, 4)]
    """Bits per code of keys and values."""
    group: Annotated[Literal[16, 32, 64, 128], Fixed()] = 32
    """Tokens that share a key channel's scale, and channels that share a value's."""
    residual: Annotated[int, Range(0, 8192), Search(32, 128)] = 128
    """Newest tokens that stay exact."""

    def check(self, model: Model) -> None:
        if engine_name(model) != "torch" or planned_format(model) != "safetensors":
            raise Misfit(
                f"{self} is a cache of the torch engine, and this recipe is served by {engine_name(model)}; use"
                " kv_cache(type=...), which chooses among that engine's own types, or remove what makes the file"
            )
        if model.blueprint.head_dim % self.group:
            raise Misfit(
                f"{self} does not fit: heads of {model.blueprint.head_dim} elements are not a multiple of its group"
                f" of {self.group}; choose a group that divides them"
            )
        if self.residual + self.group > model.run.context:
            raise Misfit(
                f"{self} would never pack a token of a context of {model.run.context}; choose a smaller residual"
            )
        reason = unpackable(read_config(model.path))
        if reason:
            raise Misfit(f"{self} packs the keys and values of every token, and {model.name} keeps others ({reason});"
                         " remove kivi")

    def apply(self, model: Model) -> Model:
        kind = KiviType(self.bits, self.group, self.residual)
        return model.but(run=replace(model.run, cache_type=str(kind)))
