"""Weights and activations in 8 bits: the product itself is computed in whole numbers.

    y_i = a s_i sum_j p_j q_ij + bias_i       s_i = max_j |w_ij| / 127, a = max_j |x_j| / 127 of this token

Weight scales belong to rows, activation scales to tokens and are found while it runs, so nothing is calibrated here.
The sums are exact; what is lost is the rounding of w and x, each at most half a step. A weight is 1 byte + 4 / columns,
so a single token (reading weights) gains, and so does a long prompt (arithmetic): 8 bits run at twice the rate of
bfloat16 where a processor has VNNI, and with AVX2 alone, multiplied in 16, faster than float32 (`native/int8.cpp`).

One large input spends the range of all others of its token. Columns that are known to be large can lie *beside*: their
inputs stay out of the scale and meet their own bfloat16 weights, 2 bytes each; or, with a `limit`, every token's inputs
of greater magnitude meet s_i q_ij in float.

`<module>.weight` is replaced by `.qweight` (int8, rows x columns), `.scale` (float32), and of columns beside `.columns`
(int32, increasing) and `.beside` (bfloat16, rows x columns beside; their codes are 0). An embedding may be stored so,
without columns beside, and then serves as the head when the model ties them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.engines import _native

TENSORS = ("qweight", "scale", "columns", "beside", "bias")
TILE, QUAD = 16, 4
WIDEST = 1 << 16
"""Columns for which a sum of products of codes certainly fits 32 bits."""
SMALL = 1 << 17
"""Products of a weight with a token below which one thread is faster than starting several."""
UNLIMITED = 3e38


def pack(weight: Tensor, columns: Tensor | None = None) -> dict[str, Tensor]:
    """A float matrix (rows, columns) -> {qweight, scale[, columns, beside]}; `columns` are indices to lie beside."""
    weight = weight.float()
    found = {}
    if columns is not None and len(columns):
        found = {"columns": columns.to(torch.int32), "beside": weight[:, columns].bfloat16()}
        weight = weight.index_fill(1, columns.long(), 0)
    scale = (weight.abs().amax(1) / 127).clamp_min(1e-30)
    return {"qweight": codes(weight, scale[:, None]), "scale": scale, **found}


def unpack(packed: Mapping[str, Tensor]) -> Tensor:
    """The float32 matrix that `pack`ed tensors stand for."""
    weight = packed["qweight"].float() * packed["scale"][:, None]
    if "columns" in packed:
        weight[:, packed["columns"].long()] = packed["beside"].float()
    return weight


def codes(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale).round().clamp(-127, 127).to(torch.int8)


def rounded(values: Tensor) -> Tensor:
    """Float values as 8 bits with a scale for each row hold them: what becomes of weights and of activations."""
    scale = (values.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return codes(values, scale) * scale


class _Layer(ctypes.Structure):
    """`Layer` of native/int8.cpp."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("codes", "start", "scale", "bias", "columns", "beside")],
        *[(name, ctypes.c_int64) for name in ("besides", "rows", "width", "tiles", "quads")],
        ("limit", ctypes.c_float),
    ]


class Int8Linear(nn.Module):
    """A linear layer over `pack`ed tensors: (..., columns) -> (..., rows), in the dtype of its input."""

    def __init__(self, packed: Mapping[str, Tensor], limit: float = UNLIMITED) -> None:
        super().__init__()
        self.library = _library()
        _check(packed, limit)
        q = packed["qweight"]
        self.out_features, self.in_features = q.shape
        self.limit = float(limit)
        self.qweight = nn.Buffer(_tiled(q))
        missing = -self.out_features % TILE
        sums = q.sum(1, dtype=torch.int32)
        self.start = nn.Buffer(nn.functional.pad(sums * -128, (0, missing)))
        self.scale = nn.Buffer(nn.functional.pad(packed["scale"], (0, missing)))
        bias = packed.get("bias", torch.zeros(self.out_features))
        self.bias = nn.Buffer(nn.functional.pad(bias.float(), (0, missing)))
        self.columns = nn.Buffer(packed.get("columns", torch.zeros(0, dtype=torch.int32)).contiguous())
        beside = packed.get("beside", torch.zeros(self.out_features, 0, dtype=torch.bfloat16))
        self.beside = nn.Buffer(nn.functional.pad(beside.T, (0, missing)).contiguous())
        self.stored = "int8 with int8 activations"
        self._few = SMALL // max(1, self.qweight.numel())
        self._pointed()

    def _pointed(self) -> None:
        """Tell the kernel where the tensors lie; to be called when they move."""
        rows, columns, tiles = self.out_features, self.in_features, len(self.qweight)
        quads = self.qweight.shape[1]
        pointers = [t.data_ptr() for t in (self.qweight, self.start, self.scale, self.bias, self.columns, self.beside)]
        self._layer = _Layer(*pointers, len(self.columns), rows, columns, tiles, quads, self.limit)
        self._address = ctypes.addressof(self._layer)

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        raise TypeError("an 8-bit layer is neither moved nor cast; read the folder again in the dtype wanted")

    def forward(self, x: Tensor) -> Tensor:
        if (dtype := x.dtype) not in (torch.float32, torch.bfloat16):
            return self.forward(x.float()).to(dtype)
        x = x if x.is_contiguous() else x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.out_features))
        count = x.numel() // self.in_features
        threads = 1 if count <= self._few else torch.get_num_threads()
        self.library.int8_linear(self._address, x.data_ptr(), y.data_ptr(), count, dtype == torch.bfloat16, threads)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, beside={len(self.columns)}"


class Int8Embedding(nn.Module):
    """An embedding over `pack`ed rows: ids (...) -> (..., columns) in `dtype`."""

    def __init__(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.head = Int8Linear({name: packed[name] for name in ("qweight", "scale")})
        self.dtype = dtype

    def as_head(self) -> Int8Linear:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        q = self.head.qweight[ids // TILE, :, ids % TILE].flatten(-2)[..., : self.head.in_features]
        return (q.float() * self.head.scale[ids][..., None]).to(self.dtype)


def _tiled(q: Tensor) -> Tensor:
    """(rows, columns) -> (tiles, quads, 16, 4), zeros where there is nothing."""
    rows, columns = q.shape
    padded = nn.functional.pad(q, (0, -columns % QUAD, 0, -rows % TILE))
    return padded.view(-1, TILE, padded.shape[1] // QUAD, QUAD).transpose(1, 2).contiguous()


@functools.cache
def _library() -> ctypes.CDLL:
    library = _native.load("int8")
    pointer, whole, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.int8_linear.argtypes = [pointer, pointer, pointer, whole, number, number]
    library.int8_linear.restype = None
    return library


def _check(packed: Mapping[str, Tensor], limit: float) -> None:
    """Raises ValueError when the tensors do not describe a matrix: the kernel trusts them."""
    q, scale = packed["qweight"], packed["scale"]
    rows, columns = q.shape
    right = (
        q.dtype == torch.int8 and int(q.min()) > -128 and columns <= WIDEST
        and scale.dtype == torch.float32 and scale.shape == (rows,)
        and ("columns" in packed) == ("beside" in packed) and limit >= 0
        and all(packed[k].shape == (rows,) for k in ("bias",) if k in packed)
    )
    if right and "columns" in packed:
        beside, found = packed["beside"], packed["columns"].long()
        right = (
            beside.dtype == torch.bfloat16 and beside.shape == (rows, len(found)) and len(found) > 0
            and packed["columns"].dtype == torch.int32 and int(found[0]) >= 0 and int(found[-1]) < columns
            and bool((found.diff() > 0).all())
        )
    if not right:
        raise ValueError("no 8-bit matrix")


def build(
    old: nn.Module, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], dtype: torch.dtype
) -> Int8Linear | Int8Embedding:
    shape = old.weight.shape
    if tuple(tensors["qweight"].shape) != tuple(shape):
        raise ValueError(shape)
    if isinstance(old, nn.Embedding):
        return Int8Embedding(tensors, dtype)
    limit = settings.get("limit")
    return Int8Linear(tensors, UNLIMITED if limit is None else limit)
