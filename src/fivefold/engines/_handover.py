"""The key-value cache of another engine in the bytes of llama.cpp's saved state.

`llama_state_seq_get_data` writes one text as 32-bit words and rows:

    magic, sequence, streams
    one number of cells per stream; only the text's own stream has any, and after its number come
        position, 1, sequence                     of each cell
        transposed, layers, rotation of keys, rotation of values
        type, bytes per cell (64 bit), rows       of the keys of each layer, then of the values

Values are stored by cell, or (`transposed`, without flash attention) by element, where the bytes per cell are instead
the bytes and the number of elements. Caches of a quantized type hold rotated vectors: each n neighbours are multiplied
by the orthonormal Hadamard matrix, which spreads outliers and cancels in the product of query and key.

Rotary embedding turns pairs of elements. In files of the llama family a pair are neighbours, elsewhere (and in
OpenVINO) the halves of a head, so there keys are reordered: (half, pair) -> (pair, half).

None of this is promised by llama.h. So it is not trusted: `check` compares, for a few tokens at the far end of the
context (where wrong rotary frequencies show), every byte of the frame and all keys and values with those of llama.cpp
itself.

Source: src/llama-kv-cache.cpp of llama.cpp (MIT), release b11549; rotation: QuaRot, arXiv 2404.00456.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fivefold.engines._quantize import StorageType, dequantize, quantize, row_bytes
from fivefold.errors import ModelError

MAGIC = 0xAF143CD8
HEAD = 12
SHALLOW, DEEP = 0.05, 0.5
"""Largest relative distance of keys or values in the first layer, which sees one product, and in the others, where the
rounding of activations adds up. Seen on SmolLM2-135M: 0.0004 and 0.08 (Q8_0); a wrong order of elements gives 1.4."""

Cache = Iterable[tuple[bool, int, NDArray[np.float32]]]
"""(is it keys, layer, (key-value heads, cells, head width) float32), in any order."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`width` is the elements of a cell's keys, over all heads; a rotation of 0 is none."""

    layers: int
    width: int
    kind: StorageType
    paired: bool
    transposed: bool
    rotations: tuple[int, int]
    """Of keys, of values."""

    def packed(
        self, cache: Cache, cells: int, *, first: int = 0, sequence: int = 0, streams: int = 1
    ) -> NDArray[np.uint8]:
        """The saved state of a text of `cells` tokens at positions first, first + 1, ..."""
        out, places = self.frame(cells, first, sequence, streams)
        found = set()
        for keys, layer, array in cache:
            found.add((keys, layer))
            out[places[layer + (0 if keys else self.layers)]] = self._stored(array, keys)
        if len(found) != 2 * self.layers:
            raise ModelError(
                f"a cache of {len(found)} parts, not {2 * self.layers}, cannot be handed over; use another engine"
            )
        return out

    def frame(
        self, cells: int, first: int, sequence: int, streams: int
    ) -> tuple[NDArray[np.uint8], list[slice]]:
        """Everything but the rows, which are 0, and where they are: keys of each layer, then values."""
        meta = np.ones((cells, 3), np.uint32)
        meta[:, 0], meta[:, 2] = np.arange(first, first + cells), sequence
        words = [
            MAGIC, sequence, streams, *[0] * sequence, cells, *meta.ravel().tolist(), self.transposed, self.layers,
            *self.rotations,
        ]
        row = row_bytes(self.kind.name, self.width)
        by_cell = np.array([self.kind.number, row, 0], np.uint32).view(np.uint8)
        by_element = np.array([self.kind.number, self.kind.block_bytes, self.width], np.uint32).view(np.uint8)
        start = 4 * len(words)
        out = np.zeros(start + 2 * self.layers * (HEAD + cells * row) + 4 * (streams - 1 - sequence), np.uint8)
        out[:start] = np.array(words, np.uint32).view(np.uint8)
        places = []
        for part in range(2 * self.layers):
            out[start : start + HEAD] = by_element if self.transposed and part >= self.layers else by_cell
            places.append(slice(start + HEAD, start + HEAD + cells * row))
            start = places[-1].stop
        return out, places

    def _stored(self, array: NDArray[np.float32], keys: bool) -> NDArray[np.uint8]:
        heads, cells, width = array.shape
        if keys and self.paired:
            array = array.reshape(heads, cells, 2, width // 2).swapaxes(2, 3)
        rows = np.moveaxis(array, 0, 1).reshape(cells, heads * width)
        rotation = self.rotations[0 if keys else 1]
        if rotation:
            rows = (rows.reshape(-1, rotation) @ hadamard(rotation)).reshape(rows.shape)
        if self.transposed and not keys:
            rows = rows.T
        return quantize(rows, self.kind.name, threads=1).reshape(-1)


def hadamard(n: int) -> NDArray[np.float32]:
    """The orthonormal matrix of n = 2^k rows: H(2n) = [[H, H], [H, -H]] / sqrt 2. It is its own inverse."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(np.sqrt(n))


def layout_of(
    saved: NDArray[np.uint8], cells: int, *, layers: int, width: int, kind: StorageType, paired: bool
) -> Layout:
    """How this context saves a text, read from a saved one of `cells` tokens in the only sequence."""
    words = saved[: len(saved) // 4 * 4].view(np.uint32)
    start = 4 + 3 * cells
    if len(words) < start + 4:
        raise ModelError(_unknown(f"it is only {len(saved)} bytes long"))
    transposed, _, *rotations = words[start : start + 4].tolist()
    known = transposed < 2 and all(n == 0 or (n <= width and width % n == 0 and n & n - 1 == 0) for n in rotations)
    if not known:
        raise ModelError(_unknown(f"its cache is of kind {[transposed, *rotations]}"))
    return Layout(
        layers=layers, width=width, kind=kind, paired=paired, transposed=bool(transposed),
        rotations=(rotations[0], rotations[1]),
    )


def check(layout: Layout, saved: NDArray[np.uint8], ours: NDArray[np.uint8], cells: int, first: int) -> None:
    """Raise ModelError unless `saved` (llama.cpp's) and `ours` agree: all bytes but the rows, and these nearly."""
    frame, places = layout.frame(cells, first, 0, 1)
    rest = np.array(saved)
    if len(rest) == len(frame):
        for place in places:
            rest[place] = 0
    if not np.array_equal(rest, frame):
        raise ModelError(_unknown("its frame is another"))
    for part, place in enumerate(places):
        what = f"the {'keys' if part < layout.layers else 'values'} of layer {part % layout.layers}"
        shape = (layout.width, cells) if layout.transposed and part >= layout.layers else (cells, layout.width)
        theirs, mine = (dequantize(state[place], layout.kind.name, shape) for state in (saved, ours))
        apart, most = distance(theirs, mine), DEEP if part % layout.layers else SHALLOW
        if not apart <= most:
            raise ModelError(
                f"openvino and llama.cpp compute {what} {apart:.2f} apart (at most {most} is rounding): they read this"
                " file differently; use one of the two engines"
            )


def distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(a)), 1e-30))


def _unknown(what: str) -> str:
    return f"this llama.cpp saves its cache in a way that is not known here ({what}); use one of the two engines"
