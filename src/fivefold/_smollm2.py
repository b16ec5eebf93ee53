"""SmolLM2-135M-Instruct from its published GGUF file, as a full-precision parent that flatters no number format.

The only weights to be had are Q4_1, so dequantised they lie exactly on a 4-bit grid: quantising them to Q4_1 again
costs nothing, and every comparison with that type would be a fiction. The *off-grid parent* computes the same
function with other weights. Three identities move them off the grid:

- RMSNorm multiplies column j of the following matrices by its gain g_j, so g can be folded into q, k, v (and gate, up)
  and the gain becomes 1. The last norm stays, because the tied embedding that follows it also reads tokens.
- down(up(x) * act) does not change when row i of `up` is multiplied by s_i > 0 and column i of `down` divided by it.
- attention is linear in its values: row (g, d) of `v` times s and the columns (h, d) of `o` divided by it, for every
  query head h that reads key-value head g.

s = exp(u), u uniform in (-0.35, 0.35), fixed seed. Only rounding remains: logits move by less than 1e-3, the relative
errors become those of an ordinary model (Q4_0 0.092, Q4_1 0.081, Q8_0 0.006).

llama.cpp stores rows of q and k interleaved for its rotary kernel; `unpermute` restores the Hugging Face order. The
tokenizer is built from the header's own tokens and merges: byte-level BPE after splitting off single digits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivefold.files import locked, remove_partial, write_text
from fivefold.paths import cache_dir
from fivefold.weights import GGUFHeader, gguf_header, write_safetensors_folder

NOTE = "off-grid parent: the published weights, rescaled without changing the function"
SEED = 20250101
SPREAD = 0.35
Array = NDArray[np.float32]

_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def off_grid(source: Path) -> Path:
    """The converted folder of the parent in the cache, made on the first call (about 540 MB)."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = cache_dir() / "bundled" / f"smollm2-135m-{version}"
    if not (folder / "model.safetensors").is_file():
        with locked(folder.with_suffix(".lock")):
            if not (folder / "model.safetensors").is_file():
                remove_partial(folder)
                convert(source, folder)
    return folder


def published(source: Path) -> Path:
    """The GGUF file itself, with the tokenizer files our engines tokenize with beside it."""
    for name, text in small_files(gguf_header(source)).items():
        if name.startswith("tokenizer") and not (source.parent / name).is_file():
            write_text(source.parent / name, text)
    return source


def convert(source: Path, folder: Path, *, rescale: bool = True) -> Path:
    """Write `source` as a Hugging Face folder in float32; `rescale=False` keeps the published weights."""
    header = gguf_header(source)
    tensors: dict[str, Array] = {}
    for name, tensor in dequantized(header):
        parts = name.split(".")
        if parts[0] == "blk":
            tensors[f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.weight"] = tensor
        else:
            tensors[{"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[parts[0]] + ".weight"] = tensor
    blueprint = header.blueprint()
    for layer in range(blueprint.layers):
        at = f"model.layers.{layer}."
        for part, heads in (("q_proj", blueprint.heads), ("k_proj", blueprint.kv_heads)):
            key = f"{at}self_attn.{part}.weight"
            tensors[key] = unpermute(tensors[key], heads)
    if rescale:
        leave_grid(tensors, blueprint.layers, blueprint.heads, blueprint.kv_heads)
    return write_safetensors_folder(folder, tensors, texts=small_files(header))


def dequantized(header: GGUFHeader) -> Iterator[tuple[str, Array]]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    for tensor in header.tensors:
        raw = np.memmap(header.file, np.uint8, "r", tensor.offset, (tensor.nbytes,))
        rows = raw.reshape(*tensor.shape[:-1], -1)
        kind = GGMLQuantizationType[tensor.type]
        values = rows.view(np.float32) if tensor.type == "F32" else dequantize(rows, kind)
        yield tensor.name, np.array(values, np.float32).reshape(tensor.shape)


def unpermute(matrix: Array, heads: int) -> Array:
    """llama.cpp's row order of q and k, (head, pair, half), to Hugging Face's (head, half, pair)."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def leave_grid(tensors: dict[str, Array], layers: int, heads: int, kv_heads: int) -> None:
    """Apply the three identities of the module in place."""
    random = np.random.default_rng(SEED)

    def scales(count: int) -> Array:
        return np.exp(random.uniform(-SPREAD, SPREAD, count)).astype(np.float32)

    for layer in range(layers):
        at = f"model.layers.{layer}."
        q, k, v, o = (f"{at}self_attn.{p}_proj.weight" for p in "qkvo")
        gate, up, down = (f"{at}mlp.{p}_proj.weight" for p in ("gate", "up", "down"))
        for norm, followers in (("input_layernorm", (q, k, v)), ("post_attention_layernorm", (gate, up))):
            gain = tensors[f"{at}{norm}.weight"]
            for name in followers:
                tensors[name] *= gain
            tensors[f"{at}{norm}.weight"] = np.ones_like(gain)
        s = scales(len(tensors[up]))
        tensors[up] *= s[:, None]
        tensors[down] /= s
        s = scales(len(tensors[v]))
        tensors[v] *= s[:, None]
        tensors[o] /= np.repeat(s.reshape(kv_heads, -1), heads // kv_heads, axis=0).ravel()


def small_files(header: GGUFHeader) -> dict[str, str]:
    """config, generation config and tokenizer files as text. End and padding are both <|im_end|>; no BOS is added."""
    meta, blueprint = header.metadata, header.blueprint()
    end, begin = meta["tokenizer.ggml.eos_token_id"], meta["tokenizer.ggml.bos_token_id"]
    ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    theta = float(meta["llama.rope.freq_base"])
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **ids,
        "hidden_size": blueprint.width, "intermediate_size": blueprint.ffn, "num_hidden_layers": blueprint.layers,
        "num_attention_heads": blueprint.heads, "num_key_value_heads": blueprint.kv_heads,
        "head_dim": blueprint.head_dim, "vocab_size": blueprint.vocab, "max_position_embeddings": blueprint.context,
        "rms_norm_eps": round(float(meta["llama.attention.layer_norm_rms_epsilon"]), 12), "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta}, "tie_word_embeddings": blueprint.tied,
        "attention_bias": False, "mlp_bias": False, "dtype": "float32",
    }
    tokens = meta["tokenizer.ggml.tokens"].read()
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokens[begin], "eos_token": tokens[end],
        "pad_token": tokens[end], "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "add_bos_token": False, "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        "model_max_length": blueprint.context, "chat_template": meta["tokenizer.chat_template"],
    }
    return {
        "config.json": _json(config), "generation_config.json": _json(ids),
        "tokenizer_config.json": _json(tokenizer_config),
        "tokenizer.json": tokenizer_json(
            tokens, meta["tokenizer.ggml.merges"].read(), meta["tokenizer.ggml.token_type"].read()
        ),
    }


def tokenizer_json(tokens: list[str], merges: list[str], types: list[int]) -> str:
    """Byte-level BPE: single digits are split off, then the words of the GPT-2 pattern. Type 3 is a special token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return str(tokenizer.to_str(pretty=True))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
