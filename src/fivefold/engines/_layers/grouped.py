"""Weights of 2, 3, 4 or 8 bits in groups, at their real width on disk and in memory, with a kernel that reads them so.

A row is cut into groups of `group` columns (0: the whole row), each with a scale s and, unless the grid is symmetric,
an offset z, both in half precision:

    symmetric    w = s (q - 2^(bits-1))          bits + 16 / group bits per weight
    otherwise    w = s q + z                     bits + 32 / group

Decoding reads every weight once, so its time falls with their bytes. For few rows of activations `native/grouped.cpp`
multiplies the codes as they lie (activations in bfloat16, sums in float32); with more than FEW rows the matrix is
turned back once, to bfloat16, and an ordinary product (`_many`) is faster.

`<module>.weight` is replaced by `.codes` (uint8, (ceil(rows / 16), ceil(columns / 32), 64 bits): tiles of 16 rows x 32
columns, laid out as the kernel says), `.scale` and `.offset` (float16, (tiles, groups, 16)). What is missing in the
last tile of either direction is padded with zeros. A module may be a linear layer (GPT-2's transposed one too) or an
embedding, which then also serves as the head when the model ties them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fivefold.engines import _native
from fivefold.engines._layers._many import times

TENSORS = ("codes", "scale", "offset", "bias")
BITS = (2, 3, 4, 8)
ROWS, COLUMNS = 16, 32
FEW = 8
SMALL = 1 << 17
"""Weights below which one thread is faster than starting several."""


def packable(columns: int, bits: int, group: int) -> bool:
    """Whether rows of `columns` can be cut into such groups; `group` 0 takes any even width."""
    whole = columns % 2 == 0 if group == 0 else group % COLUMNS == 0 and columns % group == 0
    return bits in BITS and whole


def pack(codes: Tensor, scale: Tensor, offset: Tensor | None, bits: int) -> dict[str, Tensor]:
    """Codes (rows, columns), scale and offset (rows, groups) -> {codes, scale[, offset]} as stored."""
    found = {"codes": torch.from_numpy(_laid_out(codes.numpy(), bits)), "scale": _tiled(scale)}
    return found if offset is None else {**found, "offset": _tiled(offset)}


def unpack(packed: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
    """The float32 matrix (rows, columns) that `pack`ed tensors stand for."""
    bits = packed["codes"].shape[2] // 64
    codes = torch.from_numpy(_codes(packed["codes"].numpy(), bits))
    scale = _untiled(packed["scale"]).float()
    per = codes.shape[1] // scale.shape[1]
    if "offset" in packed:
        offset = _untiled(packed["offset"]).float().repeat_interleave(per, 1)
    else:
        codes, offset = codes - (1 << bits - 1), torch.zeros(1, 1)
    return (codes * scale.repeat_interleave(per, 1) + offset)[:rows, :columns]


def _places(bits: int) -> list[tuple[int, list[tuple[int, int, int]]]]:
    """Per column pair of a block: (pair, its bits as [(word, shift, width)]), lowest bits first."""
    per = 16 // bits
    found = [(k, [(k // per, k % per * bits, bits)]) for k in range(per * bits)]
    return [*found, (15, [(word, 15, 1) for word in range(3)])] if bits == 3 else found


def _laid_out(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    rows, columns = codes.shape
    tiles, blocks = -(-rows // ROWS), -(-columns // COLUMNS)
    padded = np.pad(codes.astype(np.uint16), ((0, tiles * ROWS - rows), (0, blocks * COLUMNS - columns)))
    lanes = padded.reshape(tiles, ROWS, blocks, 16, 2).transpose(0, 2, 3, 1, 4).reshape(tiles, blocks, 16, 32)
    words = np.zeros((tiles, blocks, bits, 32), np.uint16)
    for pair, parts in _places(bits):
        taken = 0
        for word, shift, width in parts:
            words[:, :, word] |= (lanes[:, :, pair] >> taken & ((1 << width) - 1)) << shift
            taken += width
    return words.astype("<u2").view(np.uint8).reshape(tiles, blocks, 64 * bits)


def _codes(stored: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    tiles, blocks, _ = stored.shape
    words = np.ascontiguousarray(stored).view("<u2").reshape(tiles, blocks, bits, 32)
    lanes = np.zeros((tiles, blocks, 16, 32), np.uint16)
    for pair, parts in _places(bits):
        taken = 0
        for word, shift, width in parts:
            lanes[:, :, pair] |= (words[:, :, word] >> shift & ((1 << width) - 1)) << taken
            taken += width
    plain = lanes.reshape(tiles, blocks, 16, ROWS, 2).transpose(0, 3, 1, 2, 4)
    return plain.reshape(tiles * ROWS, blocks * COLUMNS).astype(np.float32)


def _tiled(values: Tensor) -> Tensor:
    rows, groups = values.shape
    padded = nn.functional.pad(values.half(), (0, 0, 0, -rows % ROWS))
    return padded.view(-1, ROWS, groups).transpose(1, 2).contiguous()


def _untiled(values: Tensor) -> Tensor:
    return values.transpose(1, 2).reshape(-1, values.shape[1])


class GroupedLinear(nn.Module):
    """A linear layer over `pack`ed tensors: (..., columns) -> (..., rows), in the dtype of its input."""

    def __init__(self, packed: Mapping[str, Tensor], rows: int, columns: int) -> None:
        super().__init__()
        _check(packed, rows, columns)
        for name in TENSORS:
            value = packed.get(name)
            setattr(self, name, None if value is None else nn.Buffer(value.contiguous()))
        self.out_features, self.in_features = rows, columns
        tiles, blocks, size = packed["codes"].shape
        self.bits = size // 64
        self.stored = f"grouped{self.bits}"
        self._padded = tiles * ROWS, blocks * COLUMNS
        self._shape = tiles, blocks, packed["scale"].shape[1], self.bits
        self._parallel = rows * columns >= SMALL
        self._places = tuple(t if t is None else t.data_ptr() for t in (self.codes, self.scale, self.offset))

    def _apply(self, fn: Any, recurse: bool = True) -> GroupedLinear:
        """Never cast nor moved: the kernel reads what is stored, on the CPU."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        y = self._times(flat.bfloat16()) if len(flat) <= FEW else times(flat, self.restored())
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _times(self, x: Tensor) -> Tensor:
        rows, columns = self._padded
        x = x.contiguous() if columns == self.in_features else nn.functional.pad(x, (0, columns - self.in_features))
        y = torch.empty(len(x), rows)
        _library().grouped_times(*self._places, x.data_ptr(), y.data_ptr(), len(x), *self._shape, self._threads())
        return y if rows == self.out_features else y[:, : self.out_features].contiguous()

    def restored(self) -> Tensor:
        """The matrix (rows, columns) in bfloat16."""
        out = torch.empty(self.out_features, self.in_features, dtype=torch.bfloat16)
        _library().grouped_restore(*self._places, out.data_ptr(), *out.shape, *self._shape, self._threads())
        return out

    def _threads(self) -> int:
        return torch.get_num_threads() if self._parallel else 1

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, groups={self._shape[2]}"


class GroupedEmbedding(nn.Module):
    """An embedding over `pack`ed rows: ids (...) -> (..., columns) in `dtype`."""

    def __init__(self, packed: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.head = GroupedLinear(packed, rows, columns)
        self.dtype = dtype

    def as_head(self) -> GroupedLinear:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        """Only the tiles the ids lie in are turned back."""
        tiles, places = torch.unique(ids // ROWS, return_inverse=True)
        own = {name: value[tiles] for name in TENSORS[:3] if (value := getattr(self.head, name)) is not None}
        rows = unpack(own, len(tiles) * ROWS, self.head.in_features)
        return rows[places * ROWS + ids % ROWS].to(self.dtype)


@functools.cache
def _library() -> ctypes.CDLL:
    library = _native.load("grouped")
    pointer, whole, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.grouped_times.argtypes = [pointer] * 5 + [whole] * 4 + [number] * 2
    library.grouped_restore.argtypes = [pointer] * 4 + [whole] * 5 + [number] * 2
    library.grouped_times.restype = library.grouped_restore.restype = None
    return library


def _check(packed: Mapping[str, Tensor], rows: int, columns: int) -> None:
    """Raises ValueError when the tensors do not describe a matrix of that shape: the kernel trusts them."""
    codes, scale, offset = packed["codes"], packed["scale"], packed.get("offset")
    tiles, blocks, size = codes.shape
    groups = scale.shape[1]
    right = (
        codes.dtype == torch.uint8 and size % 64 == 0 and size // 64 in BITS and columns % 2 == 0
        and (tiles, blocks) == (-(-rows // ROWS), -(-columns // COLUMNS)) and groups > 0 and blocks % groups == 0
        and all(t.dtype == torch.float16 and t.shape == (tiles, groups, ROWS) for t in (scale, offset) if t is not None)
        and all(packed[k].shape == (rows,) for k in ("bias",) if k in packed)
    )
    if not right:
        raise ValueError(f"no grouped matrix of {rows} x {columns}")


def build(old: Any, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    if isinstance(old, nn.Embedding):
        return GroupedEmbedding(tensors, old.num_embeddings, old.embedding_dim, dtype)
    if isinstance(old, nn.Linear):
        return GroupedLinear(tensors, old.out_features, old.in_features)
    columns, rows = old.weight.shape
    return GroupedLinear(tensors, rows, columns)
