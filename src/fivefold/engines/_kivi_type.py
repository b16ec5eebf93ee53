"""What a KIVI cache is, as one word of the run plan, and what it weighs. No torch here: planners ask this too.

    kivi2-g32-r128      2 bits, groups of 32, the newest 128 tokens (and a group that is not yet full) left as they are

Of n tokens P(n) are packed, `group` at a time, and stay so. An element of a packed token takes `bits` / 8 bytes and its
share of a scale and a zero of 16 bits, which `group` elements have together: bits / 8 + 4 / group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_WORD = re.compile(r"kivi([248])-g(\d{1,4})-r(\d{1,6})")
_OTHER = ("sliding_window", "attention_chunk_size", "num_kv_shared_layers", "kv_lora_rank", "layers_block_type",
          "cross_attention_layers", "full_attn_idxs", "attn_layer_indices")


@dataclass(frozen=True)
class KiviType:
    bits: int
    group: int
    residual: int

    @classmethod
    def parse(cls, word: str) -> KiviType | None:
        """None for a type of another kind."""
        found = _WORD.fullmatch(word)
        return cls(*map(int, found.groups())) if found else None

    def __str__(self) -> str:
        return f"kivi{self.bits}-g{self.group}-r{self.residual}"

    @property
    def element_bytes(self) -> float:
        """Of a packed token."""
        return self.bits / 8 + 4 / self.group

    def packed(self, tokens: int) -> int:
        """P(n): how many of so many tokens are packed; the oldest."""
        return max(0, tokens - self.residual) // self.group * self.group

    def mean_bytes(self, tokens: int, exact: float) -> float:
        """Bytes per element over a text of so many tokens, those not packed taking `exact`."""
        share = self.packed(tokens) / tokens if tokens else 0.0
        return share * self.element_bytes + (1 - share) * exact

    def pieces(self, held: int, more: int) -> Iterator[int]:
        """`more` tokens after `held` ones, cut where P changes: inside a piece all tokens see the same packed ones."""
        while more > 0:
            size = min(more, self.packed(held) + self.group + self.residual - held)
            yield size
            held, more = held + size, more - size


def unpackable(config: Mapping[str, Any]) -> str | None:
    """Why a model with this config.json does not keep plain keys and values of every token, or None when it does."""
    kinds = sorted({str(k) for k in config.get("layer_types") or ()} - {"full_attention"})
    if kinds:
        return f"it has layers of {kinds[0]}"
    if config.get("use_sliding_window") is False:
        config = {**config, "sliding_window": None}
    found = next((key for key in _OTHER if config.get(key)), None)
    return f"its config sets {found}" if found else None
