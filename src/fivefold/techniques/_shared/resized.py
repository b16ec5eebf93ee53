"""The widths of a pruned model, and its config, such that transformers, llama.cpp and OpenVINO read it as it is.

Rows of a GGUF matrix come in blocks of 32, so kept widths are multiples of 32. The width of a head is written out
(`head_dim`), as width / heads is no longer it. Two readers ask for more than their graph needs:

- transformers reads a Llama only when its heads divide its width. Otherwise the model is written as Mistral without a
  window, the same graph; that has no biases, so with biases the heads must divide the width.
- llama.cpp reads a Qwen2 only when heads x head_dim is its width. Otherwise the model is written as a Llama with
  attention biases, the same graph with an output bias that is 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fivefold.errors import Misfit
from fivefold.model import Blueprint, Model, read_config
from fivefold.weights import read_tensors

BLOCK = 32
_BIAS = re.compile(r".*layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.\w+_proj)\.bias")
_QUERY_BIAS = re.compile(r"(.*layers\.\d+\.self_attn\.)q_proj\.bias")
_ONLY_QWEN2 = ("layer_types", "use_sliding_window", "sliding_window", "max_window_layers")


def rounded(width: int, removed: float, step: int = BLOCK) -> int:
    """What stays of `width` after a share `removed` goes: the nearest multiple of `step` from `step` to `width`."""
    if not removed:
        return width
    return max(step, min(round(width * (1 - removed) / step), width // step) * step)


def least(width: int, step: int = BLOCK) -> float:
    """The smallest share in hundredths whose removal is not rounded away."""
    return (int(100 * step / 2 / width) + 1) / 100


def said(width: int, removed: float, kept: int, step: int = BLOCK) -> str:
    """E.g. "1536 -> 1216 (1228.8 rounded to a multiple of 32)"."""
    exact = width * (1 - removed)
    rounding = "" if abs(exact - kept) < 0.05 else f" ({exact:.1f} rounded to a multiple of {step})"
    return f"{width} -> {kept}{rounding}"


def step_of(model: Model) -> int:
    """What the residual width must stay a multiple of."""
    return math.lcm(BLOCK, model.blueprint.heads) if _biased(model) else BLOCK


def _biased(model: Model) -> bool:
    return model.blueprint.family in ("llama", "qwen2") and any(_BIAS.fullmatch(n) for n, _ in read_tensors(model.path))


def readable(blueprint: Blueprint) -> Blueprint:
    """The blueprint under the family that all engines read it as."""
    if blueprint.family == "qwen2" and blueprint.heads * blueprint.head_dim != blueprint.width:
        return replace(blueprint, family="llama")
    if blueprint.family == "llama" and blueprint.width % blueprint.heads:
        return replace(blueprint, family="mistral")
    return blueprint


def check_readable(model: Model, planned: Blueprint, owner: str) -> None:
    """Refuse widths and settings that the family of `planned` has no place for. Raises Misfit."""
    if planned.family == model.blueprint.family:
        return
    if planned.width % planned.heads and _biased(model):
        raise Misfit(
            f"{owner} leaves a width of {planned.width} and {planned.heads} heads, and transformers reads a Llama with"
            " biases only when the heads divide the width; choose another amount"
        )
    if read_config(model.path).get("use_sliding_window"):
        raise Misfit(
            f"{owner} makes heads of {model.name} narrower or wider than its width, which llama.cpp reads only of"
            " models without a sliding window; use prune_depth instead"
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
    if config.get("model_type") == blueprint.family:
        return out
    out = {key: value for key, value in out.items() if key not in _ONLY_QWEN2}
    out = {"hidden_act": "silu", "rms_norm_eps": 1e-6, **out, "model_type": blueprint.family,
           "max_position_embeddings": blueprint.context}
    if blueprint.family == "mistral":
        return {**out, "architectures": ["MistralForCausalLM"], "sliding_window": None}
    return {**out, "architectures": ["LlamaForCausalLM"], "attention_bias": True}


def completed(tensors: Mapping[str, Any], config: Mapping[str, Any], blueprint: Blueprint) -> dict[str, Any]:
    """The tensors with what the new family has besides: a Qwen2 that becomes a Llama gets output biases of 0."""
    out = dict(tensors)
    if config.get("model_type") == "qwen2" and blueprint.family == "llama":
        import torch

        from fivefold.training.module import Made

        width = blueprint.width
        for name, bias in tensors.items():
            if match := _QUERY_BIAS.fullmatch(name):
                out[f"{match[1]}o_proj.bias"] = Made(bias.dtype, (width,), lambda: torch.zeros(width))
    return out
