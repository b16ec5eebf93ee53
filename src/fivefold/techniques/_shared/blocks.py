"""Inside ggml's blocks: codes and scales of a packed matrix, taken apart and put together again.

Every type treated here stores an element as

    w = d * S * v(c) + m * B        v(c) = c - zero, or a table of 16 levels (iq4_nl, iq4_xs)

with a half-precision scale d (and minimum m) per block, a whole-number code c per element, and for types of 256 columns
whole-number sub-scales S and B per 16 or 32 elements (else S = B = 1). So w is linear in d and m, and both can be
trained and written back into the same bytes; so can c, whose bits lie in `planes`: (first bit of the code, its width,
byte and shift of every element).

S and B need no knowledge of how they are packed: they are what ggml dequantizes when d = 1, m = 0 and every code is one
above zero, and when d = 0, m = 1.

Source: ggml-common.h and dequantize_row_* of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fivefold.engines._quantize import dequantize
from fivefold.techniques._shared.gguf_types import block

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
SUB = 16
Plane = tuple[int, int, Bytes, Bytes]
"""S and B are constant over this many elements in every type."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`size` is bytes per block, `scale` and `minimum` the offsets of d and m in it; codes run from 0 to `top`."""

    size: int
    scale: int
    minimum: int | None
    zero: int
    top: int
    table: bool
    planes: tuple[Plane, ...]


def _plane(count: int, first: int, width: int, place: Callable[[int], tuple[int, int]]) -> Plane:
    spots = np.array([place(j) for j in range(count)])
    return first, width, spots[:, 0].astype(np.uint8), spots[:, 1].astype(np.uint8)


def _nibbles(count: int, start: int, run: int) -> Plane:
    """Low four bits: of every 2 * `run` elements the first `run` lie in the low, the others in the high half."""
    return _plane(count, 0, 4, lambda j: (start + j // (2 * run) * run + j % run, 4 * (j % (2 * run) // run)))


@cache
def layouts() -> dict[str, Layout]:
    """Type -> Layout of the types whose codes can be rewritten."""
    def fifth(start: int) -> Plane:
        return _plane(32, 4, 1, lambda j: (start + j // 8, j % 8))

    sixth = (
        _plane(256, 0, 4, lambda j: (64 * (j // 128) + j % 64, 4 * (j % 128 // 64))),
        _plane(256, 4, 2, lambda j: (128 + 32 * (j // 128) + j % 32, 2 * (j % 128 // 32))),
    )
    third = (
        _plane(256, 0, 2, lambda j: (32 + 32 * (j // 128) + j % 32, 2 * (j % 128 // 32))),
        _plane(256, 2, 1, lambda j: (j % 32, j // 32)),
    )
    k5 = _plane(256, 4, 1, lambda j: (16 + j % 32, j // 32))
    byte = _plane(32, 0, 8, lambda j: (2 + j, 0))
    rows = {
        "q4_0": (18, 0, None, 8, 15, False, (_nibbles(32, 2, 16),)),
        "iq4_nl": (18, 0, None, 8, 15, True, (_nibbles(32, 2, 16),)),
        "q4_1": (20, 0, 2, 0, 15, False, (_nibbles(32, 4, 16),)),
        "q5_0": (22, 0, None, 16, 31, False, (_nibbles(32, 6, 16), fifth(2))),
        "q5_1": (24, 0, 2, 0, 31, False, (_nibbles(32, 8, 16), fifth(4))),
        "q8_0": (34, 0, None, 128, 255, False, (byte,)),
        "iq4_xs": (136, 0, None, 8, 15, True, (_nibbles(256, 8, 16),)),
        "q4_k": (144, 0, 2, 0, 15, False, (_nibbles(256, 16, 32),)),
        "q5_k": (176, 0, 2, 0, 31, False, (_nibbles(256, 48, 32), k5)),
        "q6_k": (210, 208, None, 32, 63, False, sixth),
        "q3_k": (110, 108, None, 4, 7, False, third),
    }
    keys = ("size", "scale", "minimum", "zero", "top", "table", "planes")
    return {name: Layout(**dict(zip(keys, row, strict=True))) for name, row in rows.items()}  # type: ignore[arg-type]


@dataclass(kw_only=True)
class Parts:
    """One matrix: codes (rows, columns), scale and minimum (rows, blocks), steps and lows (rows, columns / SUB)."""

    type: str
    codes: Bytes
    scale: Floats
    minimum: Floats | None
    steps: Floats
    lows: Floats | None
    data: Bytes

    def matrix(self) -> Floats:
        """The weights, (rows, columns)."""
        layout, columns = layouts()[self.type], self.codes.shape[1]
        values = np.array(LEVELS, np.float32)[self.codes] if layout.table else self.codes - np.float32(layout.zero)
        per_block = block(self.type)
        out: Floats = values * np.repeat(self.steps, SUB, 1) * np.repeat(self.scale, per_block, 1)
        if self.minimum is not None and self.lows is not None:
            out += np.repeat(self.lows, SUB, 1) * np.repeat(self.minimum, per_block, 1)
        return out.reshape(-1, columns)


def take_apart(data: Bytes, type: str) -> Parts:
    """`data` is (rows, row bytes) of `type`, which must be one of `layouts()`."""
    layout = layouts()[type]
    rows = len(data)
    blocks = data.reshape(rows, -1, layout.size)
    columns = blocks.shape[1] * block(type)
    codes = np.zeros((*blocks.shape[:2], block(type)), np.uint8)
    for first, width, byte, shift in layout.planes:
        codes |= ((blocks[:, :, byte] >> shift) & ((1 << width) - 1)) << first
    if type == "q8_0":
        codes ^= 0x80
    lows = None
    if layout.minimum is not None:
        lows = dequantize(_with(data, layout, 0.0, 1.0), type, (rows, columns))[:, ::SUB].copy()
    unit = _with(data, layout, 1.0, 0.0)
    one = np.full((rows, columns), layout.zero + (0 if layout.table else 1), np.uint8)
    steps = dequantize(_write_codes(unit, type, one), type, (rows, columns))[:, ::SUB].copy()
    return Parts(type=type, codes=codes.reshape(rows, columns), scale=_half(blocks, layout.scale),
                 minimum=None if layout.minimum is None else _half(blocks, layout.minimum),
                 steps=steps, lows=lows, data=data)


def put_together(parts: Parts) -> Bytes:
    """The inverse of `take_apart`, with the codes, scales and minima `parts` holds now (rounded to half precision)."""
    layout = layouts()[parts.type]
    out = _write_codes(parts.data.copy(), parts.type, parts.codes)
    blocks = out.reshape(len(out), -1, layout.size)
    _set_half(blocks, layout.scale, parts.scale)
    if layout.minimum is not None and parts.minimum is not None:
        _set_half(blocks, layout.minimum, parts.minimum)
    return out


def _write_codes(data: Bytes, type: str, codes: Bytes) -> Bytes:
    layout = layouts()[type]
    blocks = data.reshape(len(data), -1, layout.size)
    values = codes.reshape(*blocks.shape[:2], block(type))
    if type == "q8_0":
        values = values ^ np.uint8(0x80)
    for first, width, byte, shift in layout.planes:
        part = ((values >> np.uint8(first)) & np.uint8((1 << width) - 1)) << shift
        clear = np.zeros(layout.size, np.uint8)
        np.bitwise_or.at(clear, byte, (((1 << width) - 1) << shift.astype(np.int64)).astype(np.uint8))
        blocks &= ~clear
        for place in np.unique(byte):
            blocks[:, :, place] |= np.bitwise_or.reduce(part[:, :, byte == place], axis=2)
    return data


def _with(data: Bytes, layout: Layout, scale: float, minimum: float) -> Bytes:
    out = data.copy()
    blocks = out.reshape(len(out), -1, layout.size)
    _set_half(blocks, layout.scale, np.float32(scale))
    if layout.minimum is not None:
        _set_half(blocks, layout.minimum, np.float32(minimum))
    return out


def _half(blocks: Bytes, at: int) -> Floats:
    return np.ascontiguousarray(blocks[:, :, at : at + 2]).view(np.float16)[:, :, 0].astype(np.float32)


def _set_half(blocks: Bytes, at: int, values: Floats | np.float32) -> None:
    shaped = np.broadcast_to(np.asarray(values, np.float16), blocks.shape[:2])[:, :, None]
    blocks[:, :, at : at + 2] = np.ascontiguousarray(shaped).view(np.uint8)
