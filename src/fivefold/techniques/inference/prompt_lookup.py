"""Speculative decoding that drafts from the text so far.

Where the last `ngram` tokens occurred before, the `tokens` that followed them then are a draft of what follows now.
The model checks a draft of k tokens in one pass, which reads the weights once instead of k times. With probability a
that a draft token is right, a pass yields (1 - a^(k+1)) / (1 - a) tokens on average: 1 at a = 0, 4.3 at a = 0.8 and k
= 8.

Lossless: only tokens the model itself would have drawn are kept, so under greedy decoding the text is the same up to
ties in the last bits of the logits. Lowers time and energy per token on text that copies (summaries, edits, code). On
fresh text drafts are rejected, their passes are wasted and decoding becomes slower; at large batch there is no idle
arithmetic to spend.

Source: Prompt lookup decoding (Saxena 2023), after speculative decoding, arXiv 2211.17192.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from fivefold.errors import Misfit
from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Range, Search
from fivefold.techniques._shared.serving import engine_name, limit


@dataclass(frozen=True, kw_only=True)
class PromptLookup(Technique):
    needs = frozenset({Trait.ONE_TOKEN_STEPS})
    breaks = frozenset({Trait.ONE_TOKEN_STEPS})
    lowers = {"compute": "direct", "energy": "direct", "money": "indirect"}
    may_raise = ("compute", "energy")
    runtime = True
    headline = "2-4x faster on grounded tasks"
    perturbation = 0.0

    ngram: Annotated[int, Range(1, 8), Search(1, 2, 3)] = 2
    """Tokens that must match for a draft."""
    tokens: Annotated[int, Range(1, 64), Search(4, 8, 16)] = 8
    """Tokens drafted at once."""

    def check(self, model: Model) -> None:
        if limit(model, "LOOKUP") is False:
            raise Misfit(
                f"{engine_name(model)} does not draft from the prompt; remove prompt_lookup or choose another engine"
            )

    def apply(self, model: Model) -> Model:
        return model.but(decode=replace(model.decode, lookup_ngram=self.ngram, lookup_tokens=self.tokens))
