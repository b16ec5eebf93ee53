"""Weights of which the zeros are left out: a linear layer that reads a bit per weight and the nonzero ones.

Decoding one token reads every weight once, so zeros pay when they are not read. A row is a mask of one bit per column
and its nonzero weights in bfloat16, one after the other:

    bytes per weight = 2 (1 - sparsity) + 1/8        1.125 at one half, 0.725 at 0.7; dense bfloat16 takes 2

so below a sparsity of 1/16 it costs more than it saves. Of a 2:4 pattern the usual form keeps two 2-bit places of every
four, which are the same four bits.

Up to FEW rows of activations go through the kernel (`native/sparse.cpp`), which spreads 32 weights to their columns by
one instruction where the processor has AVX-512 VBMI2, and reads the matrix once for all of them. More are arithmetic,
where zeros save nothing: the matrix is unpacked once and the dense product computes them. Both compute in the
dtype of the activations and sum in float32, so rounding the weights to bfloat16 is the only loss. Without that
instruction the kernel takes the set bits one by one, which saves memory and little or no time.

`<module>.weight` is replaced by `.mask` (int32, rows x ceil(columns / 32), bit j % 32 of word j / 32 for column j) and
`.values` (bfloat16, the nonzero weights and 32 zeros, so that a whole vector can be read at the last one).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.engines import _native

TENSORS = ("mask", "values", "bias")
WORD = 32
FEW = 16


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
        self._library = _native.load("sparse")
        count = self._library.sparse_offsets
        count.restype = _native.ctypes.c_int64
        stored = count(_pointer(self.mask), _long(len(mask)), columns, _pointer(self.offsets))
        if stored != len(values) - WORD:
            raise ValueError("the mask does not count the values")

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if len(flat) > FEW or x.dtype not in (torch.float32, torch.bfloat16):
            y = nn.functional.linear(flat, self.dense(x.dtype))
        else:
            y = self._product(flat.contiguous())
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix, (rows, columns)."""
        exact = dtype if dtype is torch.bfloat16 else torch.float32
        out = torch.empty(self.out_features, self.in_features, dtype=exact)
        self._library.sparse_unpack(
            *self._matrix(), _pointer(out), _long(self.out_features), self.in_features,
            int(exact is torch.bfloat16), torch.get_num_threads(),
        )
        return out.to(dtype)

    def _product(self, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), self.out_features)
        self._library.sparse_product(
            *self._matrix(), _pointer(x), _pointer(y), _long(self.out_features), self.in_features, len(x),
            int(x.dtype is torch.bfloat16), torch.get_num_threads(),
        )
        return y

    def _matrix(self) -> tuple[Any, Any, Any]:
        return _pointer(self.mask), _pointer(self.values), _pointer(self.offsets)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, nonzero={len(self.values) - WORD}"


def _pointer(tensor: Tensor) -> Any:
    return _native.ctypes.c_void_p(tensor.data_ptr())


_long = _native.ctypes.c_int64


def build(
    old: nn.Module, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], dtype: torch.dtype
) -> SparseLinear:
    layer = SparseLinear(tensors, int(settings["columns"]))
    if (layer.in_features, layer.out_features) != (old.in_features, old.out_features):
        raise ValueError("another matrix than the model has")
    return layer
