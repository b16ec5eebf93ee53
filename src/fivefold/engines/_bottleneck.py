"""Bottleneck adapters: two small layers with a bend between them, after attention and after the feed-forward block.

    z <- z + gelu(z D' + d) U' + u        D (size, width), U (width, size)

z is what the block is about to add to the residual stream. D and U start at a standard deviation of 0.01, the biases at
0, so that the model begins as it was. Per layer 2 (2 x width x size + size + width) numbers. They stand in the path of
every token and cannot be merged into the matrices around them, because of the bend.

A folder holds `bottleneck.json` ({"kind": "bottleneck", "version": 1, "size": 64}) and `bottleneck.safetensors`
(`<layer>.<attention or ffn>.<down, down_bias, up or up_bias>`, float32).

Source: Houlsby et al., arXiv 1902.00751, section 2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fivefold.errors import ModelError
from fivefold.weights import check_safetensors

CONFIG, WEIGHTS = "bottleneck.json", "bottleneck.safetensors"
BLOCKS = {"attention": ("self_attn", "attn", "attention", "self_attention"), "ffn": ("mlp", "feed_forward", "ffn")}
SPREAD = 0.01


class Bottleneck(nn.Module):
    """z (..., width) -> (..., width), in the dtype of z."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down, self.down_bias = nn.Parameter(torch.empty(size, width)), nn.Parameter(torch.zeros(size))
        self.up, self.up_bias = nn.Parameter(torch.empty(width, size)), nn.Parameter(torch.zeros(width))
        for matrix in (self.down, self.up):
            nn.init.trunc_normal_(matrix, std=SPREAD, a=-2 * SPREAD, b=2 * SPREAD)

    def forward(self, z: Tensor) -> Tensor:
        small = F.gelu(F.linear(z, self.down.to(z.dtype), self.down_bias.to(z.dtype)))
        return z + F.linear(small, self.up.to(z.dtype), self.up_bias.to(z.dtype))


def install(module: Any, size: int) -> dict[str, nn.Parameter]:
    """A fresh adapter behind both blocks of every layer; its numbers, by the names they are stored under.

    Raises ModelError for a family whose blocks have unknown names.
    """
    found: dict[str, nn.Parameter] = {}
    for number, layer in enumerate(_layers(module)):
        for place, names in BLOCKS.items():
            block = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
            if block is None:
                raise ModelError(f"{module.config.model_type} has no block known as {place}; use lora there")
            adapter = Bottleneck(module.config.hidden_size, size)
            block.add_module("bottleneck", adapter)
            block.register_forward_hook(_after)
            found |= {f"{number}.{place}.{name}": p for name, p in adapter.named_parameters()}
    return found


def _layers(module: Any) -> nn.ModuleList:
    depth = module.config.num_hidden_layers
    for part in module.base_model.modules():
        if isinstance(part, nn.ModuleList) and len(part) == depth:
            return part
    raise ModelError(f"no list of {depth} layers in the family {module.config.model_type}; use lora there")


def _after(block: Any, _: Any, out: Any) -> Any:
    return (block.bottleneck(out[0]), *out[1:]) if isinstance(out, tuple) else block.bottleneck(out)


def files(size: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The two files of a folder: name -> content."""
    return {CONFIG: {"kind": "bottleneck", "version": 1, "size": size}, WEIGHTS: dict(tensors)}


def load(module: Any, folder: Path, dtype: torch.dtype) -> int:
    """Install what `folder` holds, to compute in `dtype`; its size. Raises ModelError when it does not fit."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        size = int(config["size"])
        if config["kind"] != "bottleneck" or config["version"] != 1 or size < 1:
            raise ValueError(config["kind"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ModelError(f"{folder / CONFIG} is no adapter this version reads; make the artifact again") from None
    stored, own = check_safetensors(folder / WEIGHTS), install(module, size)
    strange = sorted({*stored} ^ {*own}) or [n for n, p in own.items() if stored[n].shape != tuple(p.shape)]
    if strange:
        raise ModelError(f"{folder / WEIGHTS} does not fit the model at {strange[0][:80]}; make the artifact again")
    for name, parameter in own.items():
        parameter.data = stored[name].torch().to(dtype)
        parameter.requires_grad_(False)
    return size
