"""What each model family means in llama.cpp's terms: its name there, its header keys, and how its tensors differ.

- llama, mistral: llama.cpp rotates neighbouring rows, Hugging Face rotates halves, so the rows of q and k are
  interleaved: (head, half, pair) -> (head, pair, half).
- qwen2, qwen3: rows stay; biases of q, k, v (qwen2) and norms of q, k (qwen3) are carried over.
- gemma, gemma2, gemma3_text: norms are stored as w and applied as 1 + w, so 1 is added. llama.cpp fixes the attention
  scale by the head width; another `query_pre_attn_scalar` is multiplied into q (gemma2) or into q's norm (gemma3).
- gpt2: Conv1D keeps (in, out); llama.cpp wants (out, in).

Rotary scaling "linear" and "yarn" are header keys; "llama3" is a tensor of frequency divisors. Anything the engine
would compute differently (another activation, an irregular sliding-window pattern, ...) is refused: the exported file
would be another model.

Source: convert_hf_to_gguf.py and src/models/*.cpp of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivefold.errors import ModelError
from fivefold.model import Blueprint

Array = NDArray[np.float32]
Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """`arch` is llama.cpp's name; `acts` are the activations its graph computes."""

    arch: str
    acts: tuple[str, ...] = ("silu", "swish")
    permuted: bool = False
    norm_plus_one: bool = False
    conv1d: bool = False


_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu")
FAMILIES = {
    "llama": Family(arch="llama", permuted=True),
    "mistral": Family(arch="llama", permuted=True),
    "qwen2": Family(arch="qwen2"),
    "qwen3": Family(arch="qwen3"),
    "gemma": Family(arch="gemma", acts=_GELU, norm_plus_one=True),
    "gemma2": Family(arch="gemma2", acts=_GELU, norm_plus_one=True),
    "gemma3_text": Family(arch="gemma3", acts=_GELU, norm_plus_one=True),
    "gpt2": Family(arch="gpt2", acts=("gelu_new", "gelu_pytorch_tanh"), conv1d=True),
}


def family_of(config: Config) -> Family:
    """Raises ModelError when the family, or something in its config, has no equal in llama.cpp."""
    name = config.get("model_type")
    if name not in FAMILIES:
        raise ModelError(
            f"{name!r} models cannot be written as GGUF; families that can: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[name]
    act = config.get("hidden_activation") or config.get("hidden_act") or config.get("activation_function")
    if act is not None and act not in family.acts:
        raise ModelError(f"llama.cpp computes {name} with {family.acts[0]}, not {act!r}; serve it with torch instead")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"llama.cpp rotates whole heads of {name}, this model a part; serve it with torch instead")
    return family


def transform(family: Family, name: str, tensor: Array, config: Config, blueprint: Blueprint) -> Array:
    """The tensor as llama.cpp stores it under the exported `name`; shape (rows, columns) or (n,)."""
    part = name.split(".")[2] if name.startswith("blk.") else name.split(".")[0]
    if family.conv1d and tensor.ndim == 2 and name.startswith("blk."):
        return np.ascontiguousarray(tensor.T)
    if family.permuted and part in ("attn_q", "attn_k"):
        tensor = permute(tensor, blueprint.heads if part == "attn_q" else blueprint.kv_heads)
    if family.norm_plus_one and part.endswith("norm"):
        tensor = tensor + np.float32(1)
    carrier = {"gemma2": "attn_q", "gemma3": "attn_q_norm"}.get(family.arch)
    if part == carrier:
        tensor = tensor * np.float32(_scale_left_over(family, config, blueprint))
    return tensor


def permute(tensor: Array, heads: int) -> Array:
    """Rows (head, half, pair) -> (head, pair, half); for matrices and for biases."""
    rows = len(tensor)
    rest = tensor.shape[1:]
    return tensor.reshape(heads, 2, rows // heads // 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def _scale_left_over(family: Family, config: Config, blueprint: Blueprint) -> float:
    whole = {"gemma2": 46, "gemma3": 62}[family.arch] == blueprint.layers
    fixed = blueprint.width // blueprint.heads if whole else blueprint.head_dim
    return math.sqrt(fixed / config.get("query_pre_attn_scalar", fixed))


def rope(config: Config) -> dict[str, Any]:
    """The (global) rotary settings with `rope_type` and `rope_theta`, from either generation of transformers."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    settings = dict(settings.get("full_attention", settings))
    settings.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    settings.setdefault("rope_type", settings.get("type", "default"))
    return settings


def header(family: Family, config: Config, blueprint: Blueprint) -> dict[str, int | float | str | bool]:
    """Header keys without the architecture prefix. ints are written as uint32, floats as float32."""
    keys: dict[str, int | float | str | bool] = {
        "block_count": blueprint.layers, "context_length": blueprint.context, "embedding_length": blueprint.width,
        "feed_forward_length": blueprint.ffn, "attention.head_count": blueprint.heads, "vocab_size": blueprint.vocab,
    }
    if family.arch == "gpt2":
        return {**keys, "attention.layer_norm_epsilon": float(config.get("layer_norm_epsilon", 1e-5))}
    settings = rope(config)
    keys |= {
        "attention.head_count_kv": blueprint.kv_heads, "attention.key_length": blueprint.head_dim,
        "attention.value_length": blueprint.head_dim, "rope.dimension_count": blueprint.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "rope.freq_base": float(settings["rope_theta"]), **_scaling(settings, blueprint),
    }
    return keys | _gemma(family, config) if family.norm_plus_one else keys


def _scaling(settings: Mapping[str, Any], blueprint: Blueprint) -> dict[str, int | float | str | bool]:
    kind = settings["rope_type"]
    if kind in ("default", "llama3"):
        return {}
    if kind not in ("linear", "yarn"):
        raise ModelError(f"rotary scaling {kind!r} has no equal in llama.cpp; serve this model with torch instead")
    keys: dict[str, int | float | str | bool] = {
        "rope.scaling.type": str(kind), "rope.scaling.factor": float(settings["factor"])
    }
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = int(
            settings.get("original_max_position_embeddings", blueprint.context)
        )
        for theirs, ours in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if settings.get(theirs) is not None:
                keys[f"rope.scaling.{ours}"] = float(settings[theirs])
    return keys


def _gemma(family: Family, config: Config) -> dict[str, int | float | str | bool]:
    keys: dict[str, int | float | str | bool] = {}
    for theirs, ours in (("attn_logit_softcapping", "attn_logit_softcapping"),
                         ("final_logit_softcapping", "final_logit_softcapping")):
        if config.get(theirs):
            keys[ours] = float(config[theirs])
    if family.arch == "gemma":
        return keys
    keys["attention.sliding_window"] = int(config.get("sliding_window", 4096))
    period = 2 if family.arch == "gemma2" else 6
    layers = config.get("layer_types") or []
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(layers))]
    if list(layers) != expected:
        raise ModelError(
            f"llama.cpp gives every {period}th layer of {family.arch} full attention, this model another pattern;"
            " serve it with torch instead"
        )
    if family.arch == "gemma3":
        local = (config.get("rope_parameters") or {}).get("sliding_attention", {})
        keys["rope.freq_base_swa"] = float(local.get("rope_theta", config.get("rope_local_base_freq", 10000.0)))
    return keys


def frequency_divisors(config: Config, blueprint: Blueprint) -> Array | None:
    """llama3 rotary scaling as llama.cpp's `rope_freqs.weight`, shape (head_dim / 2,); None for other kinds.

    Wavelengths short against the old context stay, long ones are divided by `factor`, those between are blended.
    """
    settings = rope(config)
    if settings["rope_type"] != "llama3":
        return None
    factor, low, high = (float(settings[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = settings["original_max_position_embeddings"] / (2 * math.pi) / settings["rope_theta"] ** (
        np.arange(0, blueprint.head_dim, 2) / blueprint.head_dim
    )
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - blend) / factor + blend)).astype(np.float32)
