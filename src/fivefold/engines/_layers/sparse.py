"""Weights of which the zeros are left out: a linear layer that reads a bit per weight and the nonzero ones.

Decoding one token reads every weight once, so zeros pay when they are not read. A row is a mask of one bit per column
and its nonzero weights in bfloat16, one after the other:

    bytes per weight = 2 (1 - sparsity) + 1/8        1.125 at one half, 0.725 at 0.7; dense bfloat16 takes 2

so below a sparsity of 1/16 it costs more than it saves. Of a 2:4 pattern the usual form keeps two 2-bit places of every
four, which are the same four bits.

Up to FEW rows of activations go through the kernel (`native/sparse.cpp`), which reads the matrix once for all of them
and spreads weights to their columns, 32 by one instruction with AVX-512 VBMI2, 8 with AVX2. More are arithmetic, where
zeros save nothing: the matrix is unpacked once and the dense product computes them. Both compute in the dtype of the
activations and sum in float32, so rounding the weights to bfloat16 is the only loss. On other processors the kernel
takes the set bits one by one, which saves memory and no time.

`<module>.weight` is replaced by `.mask` (int32, rows x ceil(columns / 32), bit j % 32 of word j / 32 for column j) and
`.values` (bfloat16, the nonzero weights and 32 zeros, so that a whole vector can be read at the last one).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.engines import _native
from fivefold.engines._layers._many import fast_dtype

TENSORS = ("mask", "values", "bias")
WORD = 32
FEW = 8
UNPACKED = 4 << 20
"""Bytes in float32 that are unpacked at once."""


def pack(weight: Tensor) -> dict[str, Tensor]:
    """A float matrix (rows, columns) -> {mask, values}; weights that bfloat16 rounds to zero are zeros."""
    rows, columns = weight.shape
    weight = weight.bfloat16()
    there = weight != 0
    padded = nn.functional.pad(there, (0, -columns % WORD)).view(rows, -1, WORD)
    words = (padded.long() << torch.arange(WORD)).sum(2)
    return {
        "mask": (words - ((words >> (WORD - 1)) << WORD)).int(),
        "values": torch.cat([weight[there], weight.new_zeros(WORD)]),
    }


def packed_bytes(rows: int, columns: int, stored: int) -> int:
    """Bytes of `pack`'s tensors for a matrix with `stored` nonzero weights."""
    return 4 * rows * -(-columns // WORD) + 2 * (stored + WORD)


class SparseLinear(nn.Module):
    """A linear layer over `pack`ed tensors: (..., columns) -> (..., rows), in the dtype of its input.

    Raises ValueError when the tensors do not belong together.
    """

    stored = "sparse"

    def __init__(self, tensors: Mapping[str, Tensor], columns: int) -> None:
        super().__init__()
        mask, values, bias = tensors["mask"], tensors["values"], tensors.get("bias")
        if columns < 1 or mask.ndim != 2 or mask.shape[1] != -(-columns // WORD) or values.ndim != 1:
            raise ValueError("mask and values do not belong to such a matrix")
        if mask.dtype is not torch.int32 or values.dtype is not torch.bfloat16:
            raise ValueError("mask and values are of other dtypes")
        self.in_features, self.out_features = columns, len(mask)
        self.mask, self.values = nn.Buffer(mask.contiguous()), nn.Buffer(values.contiguous())
        self.offsets = nn.Buffer(torch.empty(len(mask) + 1, dtype=torch.int64))
        self.bias = None if bias is None else nn.Buffer(bias)
        library = _library()
        self._places = (self.mask.data_ptr(), self.values.data_ptr(), self.offsets.data_ptr())
        stored = library.sparse_offsets(self._places[0], len(mask), columns, self._places[2])
        if stored != len(values) - WORD:
            raise ValueError("the mask does not count the values")
        self._product, self._unpack = library.sparse_product, library.sparse_unpack

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.numel() // self.in_features
        if inputs > FEW or x.dtype not in (torch.float32, torch.bfloat16):
            return self._many(x)
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.out_features)
        self._product(
            *self._places, x.data_ptr(), y.data_ptr(), self.out_features, self.in_features, inputs,
            x.dtype is torch.bfloat16, torch.get_num_threads(),
        )
        return y if self.bias is None else y + self.bias

    def _many(self, x: Tensor) -> Tensor:
        """Some rows of the matrix at a time, so that they stay in the cache and the whole is never in memory."""
        step = max(1, UNPACKED // (4 * self.in_features))
        kind = fast_dtype() if x.dtype is torch.bfloat16 else x.dtype
        parts = [nn.functional.linear(x.to(kind), self.dense(kind, first, min(first + step, self.out_features)))
                 for first in range(0, self.out_features, step)]
        y = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def dense(self, dtype: torch.dtype, first: int = 0, end: int | None = None) -> Tensor:
        """Rows `first` to `end` of the matrix, (rows, columns)."""
        exact = dtype if dtype is torch.bfloat16 else torch.float32
        out = torch.empty((self.out_features if end is None else end) - first, self.in_features, dtype=exact)
        mask, values, offsets = self._places
        self._unpack(
            mask + first * self.mask.stride(0) * 4, values, offsets + first * 8, out.data_ptr(), len(out),
            self.in_features, exact is torch.bfloat16, torch.get_num_threads(),
        )
        return out.to(dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, nonzero={len(self.values) - WORD}"


@functools.cache
def _library() -> ctypes.CDLL:
    library = _native.load("sparse")
    place, long, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.sparse_offsets.argtypes = [place, long, whole, place]
    library.sparse_offsets.restype = long
    library.sparse_product.argtypes = [place] * 5 + [long] + [whole] * 4
    library.sparse_unpack.argtypes = [place] * 4 + [long] + [whole] * 3
    library.sparse_product.restype = library.sparse_unpack.restype = None
    return library


def build(
    old: nn.Module, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], dtype: torch.dtype
) -> SparseLinear:
    layer = SparseLinear(tensors, int(settings["columns"]))
    if (layer.in_features, layer.out_features) != (old.in_features, old.out_features):
        raise ValueError("another matrix than the model has")
    return layer
