"""Weights of -1, 0 and 1 times a scale: a linear layer that reads 2 bits per weight.

    w = scale[row, group] * t,   t in -1, 0, 1            bytes: rows * (16 ceil(columns / 64) + 2 groups)

Decoding one token reads every weight once, so time falls with their bytes; no weight is multiplied. With activations
in 8 bits (`activations` 8: per vector, a = max|x| / 127) the sums are of whole numbers and exact. Up to FEW vectors go
through the kernel (`native/ternary.cpp`); more are arithmetic, where few bits save nothing: the matrix is turned back
once and the dense product computes the same. With AVX-512 sums of floats were as fast in matrices of 576 and 1,536
columns as those of whole numbers: rounding the vector takes the time that the products save. With AVX2 whole numbers
are faster.

`<module>.weight` is replaced by `.codes` (uint8, laid out as its kernel says) and `.scale` (float16, rows x groups).

Source: Ma et al., BitNet b1.58, arXiv 2402.17764.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.engines import _native

TENSORS = ("codes", "scale", "bias")
BLOCK = 64
FEW = 8


def groups_of(columns: int, group: int) -> int:
    """Groups of a row. Raises ValueError when it is not a whole number of groups of whole blocks; 0 is the row."""
    if group and (group % BLOCK or columns % group):
        raise ValueError(f"rows of {columns} are not whole groups of {group}, a multiple of {BLOCK}")
    return columns // group if group else 1


def packed_bytes(rows: int, columns: int, group: int = 0) -> int:
    """Bytes of `pack`'s tensors."""
    return rows * (16 * -(-columns // BLOCK) + 2 * groups_of(columns, group))


def pack(values: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Whole numbers -1, 0, 1 (rows, columns) and their scales (rows, groups) -> {codes, scale}."""
    rows, columns = values.shape
    shifted = nn.functional.pad(values.to(torch.int8) + 1, (0, -columns % BLOCK), value=1).to(torch.uint8)
    fields = shifted.view(rows, -1, 4, 16)
    codes = fields[:, :, 0] | fields[:, :, 1] << 2 | fields[:, :, 2] << 4 | fields[:, :, 3] << 6
    return {"codes": codes.reshape(rows, -1).contiguous(), "scale": scale.half().contiguous()}


def unpack(codes: Tensor, columns: int) -> Tensor:
    """The float32 numbers -1, 0, 1 (rows, columns)."""
    bytes_ = codes.view(len(codes), -1, 16)
    fields = torch.stack([bytes_ >> place & 3 for place in (0, 2, 4, 6)], 2)
    return fields.view(len(codes), -1)[:, :columns].float() - 1


class TernaryLinear(nn.Module):
    """A linear layer over `pack`ed tensors: (..., columns) -> (..., rows), in the dtype of its input.

    Raises ValueError when the tensors do not belong together.
    """

    def __init__(self, tensors: Mapping[str, Tensor], columns: int, group: int, activations: int) -> None:
        super().__init__()
        codes, scale, bias = tensors["codes"], tensors["scale"], tensors.get("bias")
        shapes = (len(codes), 16 * -(-columns // BLOCK)), (len(codes), groups_of(columns, group))
        if (codes.shape, scale.shape) != shapes or codes.dtype != torch.uint8 or scale.dtype != torch.float16:
            raise ValueError("codes and scales do not belong to such a matrix")
        if activations not in (0, 8) or (codes & codes >> 1 & 0x55).any():
            raise ValueError("codes of ternary weights are 0, 1 and 2, activations of 8 bits or whole")
        self.in_features, self.out_features, self.group = columns, len(codes), group
        self.activations, self.stored = activations, "ternary"
        self.codes, self.scale = nn.Buffer(codes.contiguous()), nn.Buffer(scale.contiguous())
        self.bias = None if bias is None else nn.Buffer(bias)
        library = _native.load("ternary")
        self._product = library.ternary_int8 if activations else library.ternary_float

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features).float().contiguous()
        y = self._kernel(flat) if len(flat) <= FEW else self._dense(flat)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _kernel(self, x: Tensor) -> Tensor:
        out = torch.empty(len(x), self.out_features)
        pointers = (_native.ctypes.c_void_p(t.data_ptr()) for t in (self.codes, self.scale, x, out))
        sizes = (len(x), self.out_features, self.in_features, self.group)
        self._product(*pointers, *map(_native.ctypes.c_int64, sizes))
        return out

    def _dense(self, x: Tensor) -> Tensor:
        weight = unpack(self.codes, self.in_features)
        weight = (weight.view(*self.scale.shape, -1) * self.scale.float()[:, :, None]).view_as(weight)
        return nn.functional.linear(rounded(x) if self.activations else x, weight)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group={self.group}, activations={self.activations}"


def rounded(x: Tensor) -> Tensor:
    """`x` as 8 bits per vector (the last dimension) can say it."""
    most = x.abs().amax(-1, keepdim=True)
    up = torch.where(most > 0, 127 / most, 0)
    return (x * up).round() * (most / 127)


def build(
    old: nn.Module, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], dtype: torch.dtype
) -> TernaryLinear:
    if not isinstance(old, nn.Linear):
        raise TypeError("only linear layers are stored in ternary weights")
    return TernaryLinear(tensors, old.in_features, settings["group"], settings["activations"])
