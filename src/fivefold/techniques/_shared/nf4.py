"""A model whose linear layers lie in memory as NF4, by bitsandbytes.

A block of 64 neighbours shares its largest magnitude s, and a weight is s times one of 16 levels, the quantiles of a
normal distribution. The s of 256 blocks, less their mean, are 8-bit numbers themselves (double quantization):

    bits per weight = 4 + 8 / 64 + 32 / (64 * 256) = 4.127

The folder is read one tensor at a time: no second copy of the weights is ever in memory. On processors with bfloat16
instructions bitsandbytes would, at a layer's first pass in evaluation mode, reorder its weight and round its scales to
bfloat16 in place, and the passes after that have no gradient: here that is switched off.

Source: Dettmers et al., arXiv 2305.14314.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from fivefold.engines._peft import bitsandbytes
from fivefold.errors import Misfit, ModelError
from fivefold.model import Model
from fivefold.techniques._shared.modules import linears
from fivefold.training.module import stored_name
from fivefold.weights import StoredTensor, read_tensors

BLOCK, BLOCKS = 64, 256
TABLES = 4 * (16 + 256)
"""Bytes of the tables of levels and of 8-bit magnitudes, which all matrices share."""


def nf4_bytes(weights: int) -> int:
    """Bytes of a matrix of so many weights, without the tables."""
    blocks = math.ceil(weights / BLOCK)
    return math.ceil(weights / 2) + blocks + 4 * math.ceil(blocks / BLOCKS) + 4


def load_nf4(model: Model, dtype: torch.dtype) -> Any:
    """The causal language model in `model.path` with the linear layers of its decoder in NF4, the rest in `dtype`.

    In evaluation mode and without gradients. Raises Misfit for a GGUF file, ModelError for a folder that does not fit.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    if model.format != "safetensors":
        raise Misfit(f"{model.name} is a GGUF file and has no torch graph; start from its safetensors folder")
    stored = dict(read_tensors(model.path))
    try:
        config = AutoConfig.from_pretrained(model.path, local_files_only=True, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"transformers cannot read {model.path} ({reason}); give a family it knows") from None
    for name, part in list(linears(module)):
        parent, _, leaf = name.rpartition(".")
        place = stored[stored_name(module, stored, f"{name}.weight")]
        turned = not isinstance(part, nn.Linear)
        weight = torch.from_numpy(place.numpy())
        setattr(module.get_submodule(parent), leaf, _packed(weight.T if turned else weight, part.bias, dtype))
    _fill(module, stored, dtype)
    module.is_loaded_in_4bit = True
    return module.eval().requires_grad_(False)


@cache
def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    _, state = bitsandbytes().functional.quantize_4bit(torch.ones(BLOCK), compress_statistics=True, quant_type="nf4")
    return state.code, state.state2.code


def _packed(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' layer of a float32 weight (outputs, inputs)."""
    bnb = bitsandbytes()
    data, state = bnb.functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    state.dtype = dtype
    state.code, state.state2.code = _tables()
    layer: nn.Module = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    layer.weight = bnb.nn.Params4bit(
        data, requires_grad=False, quant_state=state, blocksize=BLOCK, compress_statistics=True, quant_type="nf4",
        bnb_quantized=True, module=layer,
    )
    layer.quant_state = state
    layer.support_avx512bf16_for_cpu = False
    return layer


def _fill(module: Any, stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> None:
    """Read what is still empty: all but the packed matrices."""
    module.tie_weights()
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta:
            value = stored[stored_name(module, stored, name)].torch().to(dtype)
            if value.shape != parameter.shape:
                raise ModelError(f"{name} is stored as {list(value.shape)} and the config says"
                                 f" {list(parameter.shape)}; copy the model again")
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    module.tie_weights()


def unpacked(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight (outputs, inputs) of a packed layer."""
    state = layer.weight.quant_state
    out: torch.Tensor = bitsandbytes().functional.dequantize_4bit(layer.weight.data, state)
    return out.to(dtype)


def exact(layer: Any) -> torch.Tensor:
    """The same in float32, whatever the layer computes in."""
    state = layer.weight.quant_state
    computing, state.dtype = state.dtype, torch.float32
    try:
        return unpacked(layer, torch.float32)
    finally:
        state.dtype = computing
