"""Small GGUF files of random weights with the widths of a real model: what the speed of storage types is measured on.

Speed depends on the type, the width of the rows and whether the bytes come from memory, not on the values. So a few
random rows are quantized once and repeated to the wanted number of rows, and every layer is the same. No tokenizer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fivefold.model import Blueprint

ROWS = 64
LARGEST_LAYER = 1 << 25
"""Weights of a layer above which all widths are halved; time per weight no longer depends on them there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Widths of one decoder layer (llama's: q, k, v, o, gate, up, down)."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    @classmethod
    def of(cls, blueprint: Blueprint) -> Shape:
        """The blueprint's own widths, halved while a layer is very large and the halves still suit the same types."""
        shape = cls(width=blueprint.width, heads=blueprint.heads, kv_heads=blueprint.kv_heads,
                    head_dim=blueprint.head_dim, ffn=blueprint.ffn)
        while shape.layer > LARGEST_LAYER and all(n % 512 == 0 for n in (shape.width, shape.ffn, shape.units)):
            if shape.heads % 2 or (shape.kv_heads % 2 and shape.kv_heads != 1):
                break
            shape = cls(width=shape.width // 2, heads=shape.heads // 2, kv_heads=max(1, shape.kv_heads // 2),
                        head_dim=shape.head_dim, ffn=shape.ffn // 2)
        return shape

    @property
    def units(self) -> int:
        """Width of the attention, heads x head_dim."""
        return self.heads * self.head_dim

    @property
    def layer(self) -> int:
        """Weights of one layer."""
        return sum(rows * columns for rows, columns in self.matrices().values())

    @property
    def tail(self) -> float:
        """Share of a layer's weights that the last layer needs only where logits are wanted: all but q, k, v."""
        sizes = {name: rows * columns for name, (rows, columns) in self.matrices().items()}
        return 1 - (sizes["attn_q"] + sizes["attn_k"] + sizes["attn_v"]) / self.layer

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Exported name within a layer -> (rows, columns); columns are the inputs."""
        kept = self.kv_heads * self.head_dim
        return {
            "attn_q": (self.units, self.width), "attn_k": (kept, self.width), "attn_v": (kept, self.width),
            "attn_output": (self.width, self.units), "ffn_gate": (self.ffn, self.width),
            "ffn_up": (self.ffn, self.width), "ffn_down": (self.width, self.ffn),
        }


def kind_for(kind: str, columns: int) -> str:
    """`kind` where a row of that width can hold it, else q8_0, else f16."""
    return next(k for k in (kind, "q8_0", "f16") if columns % block_sizes(k)[0] == 0)


@lru_cache(maxsize=64)
def block_sizes(kind: str) -> tuple[int, int]:
    """Weights and bytes of a block, from the format's own table; the engine is not loaded."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    return int(weights), int(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """One file: `layers` of `shape` stored as `kind` where it fits, and a tied embedding of `vocab` rows as `head`."""

    shape: Shape
    layers: int
    kind: str
    head: str = "q8_0"
    vocab: int = 256

    def weights(self, prompt: bool = False) -> Counter[str]:
        """Type -> weights in the layers; with `prompt` those that every token of a prompt passes through."""
        found: Counter[str] = Counter()
        for name, (rows, columns) in self.shape.matrices().items():
            all_tokens = not prompt or name in ("attn_q", "attn_k", "attn_v")
            found[kind_for(self.kind, columns)] += (self.layers if all_tokens else self.layers - 1) * rows * columns
        return found

    def write(self, path: Path) -> Path:
        import gguf

        shape = self.shape
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(self.layers)
        writer.add_context_length(4096)
        writer.add_embedding_length(shape.width)
        writer.add_feed_forward_length(shape.ffn)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(self.vocab)

        def matrix(name: str, rows: int, columns: int, kind: str) -> None:
            number = gguf.GGMLQuantizationType[kind.upper()]
            data = _packed(kind, columns)
            repeated = np.tile(data, (-(-rows // len(data)), 1))[:rows]
            writer.add_tensor(name, repeated, raw_dtype=number)

        ones = np.ones(shape.width, np.float32)
        matrix("token_embd.weight", self.vocab, shape.width, kind_for(self.head, shape.width))
        writer.add_tensor("output_norm.weight", ones)
        for i in range(self.layers):
            writer.add_tensor(f"blk.{i}.attn_norm.weight", ones)
            writer.add_tensor(f"blk.{i}.ffn_norm.weight", ones)
            for name, (rows, columns) in shape.matrices().items():
                matrix(f"blk.{i}.{name}.weight", rows, columns, kind_for(self.kind, columns))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@lru_cache(maxsize=64)
def _packed(kind: str, columns: int) -> NDArray[np.uint8]:
    from fivefold.engines._quantize import quantize

    values = np.random.default_rng(columns).standard_normal((ROWS, columns), np.float32) / np.sqrt(columns)
    return quantize(values.astype(np.float32), kind)
