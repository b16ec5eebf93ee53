"""Weights of 8 or 4 bits: a linear layer and an embedding that compute from them.

Decoding one token reads every weight once, so time falls with their bytes. Weights are stored as whole numbers q and
turned back as

    8 bits   w = q * scale[row]                        q in -127..127
    4 bits   w = (q - 8) * scale[row, g] + zero[row, g]  q in 0..15, g = column // group

Scales and zeros are bfloat16, and q is rounded against the *stored* scale, so packing is the only loss. Bytes per
weight: 1 + 2/columns, and 0.5 + 4/group.

The activations are cast to bfloat16: that is what PyTorch's weight-only kernels for the CPU are fast in. With more
than FEW rows of activations, 8-bit weights are turned back once for all of them and a product (`_many`) is faster; the
4-bit kernel's layout differs between CPUs, so it is used for any number of rows. Measured on one core with AVX-512,
1536 x 576, one row of activations, weights not in the cache: float32 363 us, bfloat16 251, 8 bits 137, 4 bits 51.

`<module>.weight` is replaced by `.qweight`, `.scale` and, of 4 bits, `.zero`; 4-bit columns lie two in a byte, the even
one low. A packed embedding (8 bits only) also serves as the output head when the model ties them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.engines._layers import write_layers
from fivefold.engines._layers._many import times
from fivefold.errors import ModelError
from fivefold.weights import StoredTensor

TENSORS = ("qweight", "scale", "zero", "bias")
GROUPS = (32, 64, 128, 256)
FEW = 8


def packable(rows: int, columns: int, bits: int, group: int = 0) -> bool:
    """Whether a matrix of this shape can be packed: 4 bits need whole groups and rows in sixteens."""
    return bits == 8 or (bits == 4 and group in GROUPS and columns % group == 0 and rows % 16 == 0)


def pack(weight: Tensor, bits: int, group: int = 0) -> dict[str, Tensor]:
    """A float matrix (rows, columns) -> {qweight, scale[, zero]}. Raises ValueError when not `packable`."""
    rows, columns = weight.shape
    if not packable(rows, columns, bits, group):
        raise ValueError(f"a {rows} x {columns} matrix cannot be packed to {bits} bits in groups of {group}")
    weight = weight.float()
    if bits == 8:
        scale = (weight.abs().amax(1) / 127).clamp_min(1e-30).bfloat16()
        q = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        return {"qweight": q.to(torch.int8), "scale": scale}
    grouped = weight.view(rows, columns // group, group)
    low, high = grouped.amin(2), grouped.amax(2)
    scale = ((high - low) / 15).clamp_min(1e-30).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    q = ((grouped - zero.float()[:, :, None]) / scale.float()[:, :, None] + 8).round().clamp(0, 15).to(torch.uint8)
    q = q.view(rows, columns)
    return {"qweight": q[:, ::2] | q[:, 1::2] << 4, "scale": scale, "zero": zero}


def unpack(packed: Mapping[str, Tensor]) -> Tensor:
    """The float32 matrix that `pack`ed tensors stand for."""
    q, scale = packed["qweight"], packed["scale"].float()
    if "zero" not in packed:
        return q.float() * scale[:, None]
    whole = _nibbles(q)
    grouped = whole.view(len(whole), scale.shape[1], -1).float() - 8
    return (grouped * scale[:, :, None] + packed["zero"].float()[:, :, None]).view(whole.shape)


def _nibbles(q: Tensor) -> Tensor:
    return torch.stack((q & 15, q >> 4), 2).view(len(q), -1)


def _aligned(q: Tensor) -> Tensor:
    """PyTorch's 8-bit kernel reads the last rows by aligned loads, and a tensor in a file may begin anywhere."""
    return q if q.data_ptr() % 64 == 0 else q.clone()


class PackedLinear(nn.Module):
    """A linear layer over `pack`ed tensors: (..., columns) -> (..., rows), in the dtype of its input."""

    def __init__(self, packed: Mapping[str, Tensor]) -> None:
        super().__init__()
        bias = packed.get("bias")
        self.scale = nn.Buffer(packed["scale"])
        self.bits = 4 if "zero" in packed else 8
        self.stored = f"int{self.bits}"
        self.out_features = len(self.scale)
        self.bias = None if bias is None else nn.Buffer(bias)
        if self.bits == 8:
            self.qweight = nn.Buffer(_aligned(packed["qweight"]))
            self.in_features = self.qweight.shape[1]
            return
        q = _nibbles(packed["qweight"])
        self.in_features = q.shape[1]
        self.group = self.in_features // self.scale.shape[1]
        self.qweight = nn.Buffer(torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1))
        self.scale = nn.Buffer(torch.stack((packed["scale"].T, packed["zero"].T), 2).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        y = self._kernel(flat.bfloat16()) if self.bits == 4 or len(flat) <= FEW else self._dequantized(flat)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _kernel(self, x: Tensor) -> Tensor:
        if self.bits == 8:
            return torch.ops.aten._weight_int8pack_mm(x, self.qweight, self.scale)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.qweight, self.group, self.scale)

    def _dequantized(self, x: Tensor) -> Tensor:
        return times(x, self.qweight) * self.scale

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


class PackedEmbedding(nn.Module):
    """An embedding over 8-bit `pack`ed rows: ids (...) -> (..., columns) in `dtype`."""

    def __init__(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.qweight, self.scale = nn.Buffer(_aligned(packed["qweight"])), nn.Buffer(packed["scale"])
        self.dtype = dtype

    def as_head(self) -> PackedLinear:
        return PackedLinear({"qweight": self.qweight, "scale": self.scale})

    def forward(self, ids: Tensor) -> Tensor:
        return (self.qweight[ids].float() * self.scale[ids].float()[..., None]).to(self.dtype)


def build(
    old: nn.Module, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], dtype: torch.dtype
) -> PackedLinear | PackedEmbedding:
    if settings["bits"] not in (4, 8):
        raise ValueError(settings["bits"])
    return PackedEmbedding(tensors, dtype) if isinstance(old, nn.Embedding) else PackedLinear(tensors)


def write_packed(source: Path, target: Path, layers: Mapping[str, tuple[int, int]]) -> Path:
    """Copy the model folder `source` to the new folder `target` with `layers` (module -> bits, group) packed.

    Raises ModelError when a layer is not there or cannot be packed.
    """
    def make(name: str, weight: StoredTensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        bits, group = settings["bits"], settings["group"]
        if len(weight.shape) != 2 or not packable(weight.shape[0], weight.shape[1], bits, group):
            raise ModelError(f"{name} of {source} cannot be packed to {bits} bits in groups of {group}; leave it out")
        return pack(weight.torch(), bits, group)

    settings = {name: {"kind": "packed", "bits": bits, "group": group} for name, (bits, group) in layers.items()}
    return write_layers(source, target, settings, make)
