"""Rounding with feedback in both directions: what one weight loses, later columns and later rows make up for.

`feedback` treats the rows of a matrix apart. But outputs are not weighed apart: to second order the KL is

    1/2 tr(A D^T B D)      A = E[|b|^2 x x^T],   B = E[|x|^2 b b^T] / tr A

with x the inputs and b the gradients at the outputs (`sensitivity`). Where B is far from diagonal, an error in one row
can be cancelled by others just as in columns. In order of rows and columns, with inverse(A) = U^T U and inverse(B) =
V^T V, the target of an element is moved by what the rows before lost (V), then by what the columns before lost (U): the
factor of a Kronecker product is the product of the factors. Then scales and codes are fitted again in turn, as in
`feedback`, each row against a target shifted by the errors of all others: sum_k B_rk D_k / B_rr. Where several rows
move at once, they go only as far as the whole falls.

Types, scales and minima are ggml's own. The inner loops are ours, in C++ (`engines/native/two_sided.cpp`).

Sources: Tseng et al., YAQA, arXiv 2505.22988, for the Kronecker curvature and its rounding; GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fivefold.engines._native import load
from fivefold.techniques._shared import feedback
from fivefold.techniques._shared.blocks import LEVELS, Parts, layouts, put_together, take_apart
from fivefold.techniques._shared.gguf_types import block

Packed = NDArray[np.uint8]
SWEEPS = 3
ROWS = 64
"""Rows whose scales are fitted at once, against the errors of the others."""
LEVELS32 = np.array(LEVELS, np.float32)


def round_both_ways(
    matrix: NDArray[np.float32], type: str, hessian: torch.Tensor, upper: torch.Tensor, rows: torch.Tensor | None,
    *, sweeps: int = SWEEPS,
) -> Packed:
    """(rows, columns) -> bytes of `type`. `upper` is `feedback.factor(hessian)`; `rows` is B, None: the rows apart."""
    if rows is None:
        return np.concatenate([
            _Work(matrix[i : i + feedback.ROWS], type, hessian, upper, None).done(sweeps)
            for i in range(0, len(matrix), feedback.ROWS)
        ])
    return _Work(matrix, type, hessian, upper, rows).done(sweeps)


class _Work:
    """One matrix on its way: packed bytes, and what is needed to improve them."""

    def __init__(
        self, matrix: NDArray[np.float32], type: str, hessian: torch.Tensor, upper: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> None:
        self.matrix = np.ascontiguousarray(matrix)
        self.type, self.layout = type, layouts()[type]
        self.metric = _damped(hessian)
        self.coupling = None if rows is None else _damped(rows)
        self.upper = upper.contiguous()
        self.down = None if rows is None else feedback.factor(rows).contiguous()
        self.weights = feedback.importance(hessian)

    def done(self, sweeps: int) -> Packed:
        target = torch.from_numpy(self.matrix)
        packed = feedback._in_order(target, self.type, self.weights, self.upper)
        if not bool(self.metric.any()):
            return packed
        if self.down is not None:
            packed = self._codes(feedback._fit_scales(target, packed, self.type, self.metric), first=True)
        for _ in range(sweeps):
            packed = self._codes(self._scales(packed), first=False)
        return self._scales(packed) if sweeps else packed

    def _codes(self, packed: Packed, *, first: bool) -> Packed:
        parts = take_apart(packed, self.type)
        unit, offset = _grid(parts)
        value = np.ascontiguousarray(parts.matrix())
        codes = np.ascontiguousarray(parts.codes)
        levels = LEVELS32 if self.layout.table else None
        ways = (self.upper, self.down) if first else (self.metric, self.coupling)
        call = load("two_sided").first_pass if first else load("two_sided").sweep
        call(ctypes.c_int64(codes.shape[0]), ctypes.c_int64(codes.shape[1]), _at(self.matrix), _at(unit), _at(offset),
             _at(levels), ctypes.c_int(self.layout.zero), ctypes.c_int(self.layout.top), *map(_at, ways), _at(codes),
             _at(value))
        parts.codes = codes
        return put_together(parts)

    def _scales(self, packed: Packed) -> Packed:
        """Scales and minima of all rows fitted again, codes fixed; with B a few rows at a time, as far as it helps."""
        matrix, out = torch.from_numpy(self.matrix), packed.copy()
        if self.coupling is None:
            return feedback._fit_scales(matrix, out, self.type, self.metric)
        error = torch.from_numpy(take_apart(out, self.type).matrix()) - matrix
        own = self.coupling.diagonal()[:, None]
        for start in range(0, len(matrix), ROWS):
            here = slice(start, min(start + ROWS, len(matrix)))
            pull = self.coupling[here] @ error
            wanted = matrix[here] + error[here] - pull / own[here]
            old = take_apart(out[here], self.type)
            new = take_apart(feedback._fit_scales(wanted, out[here], self.type, self.metric), self.type)
            before = torch.from_numpy(old.matrix())
            change = torch.from_numpy(new.matrix()) - before
            ahead = change @ self.metric
            slope, bend = (pull * ahead).sum(), ((self.coupling[here, here] @ change) * ahead).sum()
            out[here] = put_together(_between(old, new, float((-slope / bend.clamp_min(1e-30)).clamp(0, 1))))
            error[here] = torch.from_numpy(take_apart(out[here], self.type).matrix()) - matrix[here]
        return out


def _between(old: Parts, new: Parts, share: float) -> Parts:
    """The weights are linear in scales and minima, so this is `share` of the way."""
    new.scale = old.scale + share * (new.scale - old.scale)
    if new.minimum is not None and old.minimum is not None:
        new.minimum = old.minimum + share * (new.minimum - old.minimum)
    return new


def _damped(metric: torch.Tensor) -> torch.Tensor:
    return (metric + feedback.DAMP * metric.diagonal().mean() * torch.eye(len(metric))).contiguous()


def _grid(parts: Parts) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Unit and offset of every element, as the file will hold them."""
    per = block(parts.type)

    def spread(steps: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
        half = scale.astype(np.float16).astype(np.float32)
        return np.ascontiguousarray(feedback._spread(steps).numpy() * np.repeat(half, per, 1))

    unit = spread(parts.steps, parts.scale)
    if parts.minimum is None or parts.lows is None:
        return unit, None
    return unit, spread(parts.lows, parts.minimum)


def _at(array: Any) -> ctypes.c_void_p:
    if array is None:
        return ctypes.c_void_p()
    return ctypes.c_void_p(array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data)
