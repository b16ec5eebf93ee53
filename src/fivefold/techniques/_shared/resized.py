"""The config of a model whose widths were cut, such that transformers, llama.cpp and OpenVINO read it as it is.

Rows of a GGUF matrix come in blocks of 32, so kept widths are multiples of 32. The width of a head is written out
(`head_dim`), as width / heads is no longer it. transformers refuses a Llama whose width its heads do not divide though
its graph does not need it; such a model is written as Mistral without a window, which is the same graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fivefold.errors import Misfit
from fivefold.model import Blueprint, Model, read_config

BLOCK = 32


def rounded(width: int, removed: float) -> int:
    """What stays of `width` after a share `removed` goes: the nearest multiple of 32 from 32 to `width`."""
    if not removed:
        return width
    return max(BLOCK, min(round(width * (1 - removed) / BLOCK), width // BLOCK) * BLOCK)


def least(width: int) -> float:
    """The smallest share in hundredths whose removal is not rounded away."""
    return (int(100 * BLOCK / 2 / width) + 1) / 100


def said(width: int, removed: float, kept: int) -> str:
    """E.g. "1536 -> 1216 (1228.8 rounded to a multiple of 32)"."""
    exact = width * (1 - removed)
    rounding = "" if abs(exact - kept) < 0.05 else f" ({exact:.1f} rounded to a multiple of {BLOCK})"
    return f"{width} -> {kept}{rounding}"


def readable(blueprint: Blueprint) -> Blueprint:
    """The blueprint under the family that transformers reads it as."""
    odd = blueprint.family == "llama" and blueprint.width % blueprint.heads
    return replace(blueprint, family="mistral") if odd else blueprint


def check_readable(model: Model, planned: Blueprint, owner: str) -> None:
    """Refuse a Llama with biases, which Mistral has not, at a width its heads do not divide. Raises Misfit."""
    config = read_config(model.path)
    if planned.family != model.blueprint.family and (config.get("attention_bias") or config.get("mlp_bias")):
        raise Misfit(
            f"{owner} leaves a width of {planned.width} and {planned.heads} heads, and transformers reads a Llama with"
            " biases only when the heads divide the width; choose another amount"
        )


def resized(config: Mapping[str, Any], blueprint: Blueprint) -> dict[str, Any]:
    """The config with the widths of `blueprint`."""
    if blueprint.family == "gpt2":
        return {**config, "n_inner": blueprint.ffn}
    out = {
        **config, "hidden_size": blueprint.width, "intermediate_size": blueprint.ffn, "head_dim": blueprint.head_dim,
        "num_attention_heads": blueprint.heads, "num_key_value_heads": blueprint.kv_heads,
        "tie_word_embeddings": blueprint.tied,
    }
    if config.get("model_type") != blueprint.family:
        out |= {"model_type": blueprint.family, "architectures": ["MistralForCausalLM"], "sliding_window": None}
    return out
