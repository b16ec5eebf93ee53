"""Rounding with feedback: what one column loses, the others make up for.

The error of a row is D H D^T with H the columns' joint weight (see `sensitivity`). It is lowered in three ways, each
with the storage type's own codes, scales and minima, so the result is a file any llama.cpp reads:

1. *Order.* Once column j is fixed with error e_j, the best change of the columns not yet rounded is

       w_k += -e_j U_jk / U_jj      with  H^-1 = U^T U, U upper triangular            (GPTQ)

   The scales of a block are chosen by ggml's own quantizer for the weights as moved so far, then its columns are
   rounded one by one.
2. *Scales.* With the codes fixed, w = sum_b d_b v_b + m_b B_b is linear in all scales and minima of the row: least
   squares in the metric H, one small system per row.
3. *Codes again.* With the scales fixed, a sweep of coordinate descent: every code moves to the one nearest to
   q_j - (D H)_j / H_jj, which now also looks back at the columns before it.

2 and 3 are done `sweeps` times. Blocks are those of the storage type (32 or 256 columns).

Sources: GPTQ (Frantar et al., arXiv 2210.17323); Optimal Brain Surgeon; QuantEase (Behdin et al., arXiv 2309.01885)
for coordinate descent.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fivefold.engines._quantize import quantize
from fivefold.techniques._shared.blocks import LEVELS, SUB, Parts, layouts, put_together, take_apart
from fivefold.techniques._shared.gguf_types import block

Packed = NDArray[np.uint8]
SWEEPS = 2
DAMP = 0.01
"""Added to the diagonal, as a share of its mean: columns that hardly ever receive anything still count a little."""
RIDGE = 1e-3
"""Pull of the scales towards ggml's, as a share of the system's mean diagonal."""
ROWS = 4096
"""Rows treated at once: bounds the memory beside the matrix itself."""
STRIP = 64


def factor(hessian: torch.Tensor, damp: float = DAMP) -> torch.Tensor:
    """U, upper triangular, with (H + damp mean(diag H) I)^-1 = U^T U; shape (columns, columns).

    A column that never receives anything is weighed like the damping alone.
    """
    mean = float(hessian.diagonal().mean()) or 1.0
    damped = hessian.double() / mean + damp * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def importance(hessian: torch.Tensor) -> NDArray[np.float32]:
    """The diagonal of H as weights of columns, positive."""
    diagonal = hessian.diagonal().clamp_min(0)
    return (diagonal + 1e-6 * diagonal.mean() + 1e-30).numpy()


def round_with_feedback(
    matrix: NDArray[np.float32], type: str, hessian: torch.Tensor, upper: torch.Tensor, *, sweeps: int = SWEEPS
) -> Packed:
    """(rows, columns) -> bytes of `type`, (rows, row bytes). `upper` is `factor(hessian)`.

    `type` is one of `blocks.layouts()`. `sweeps` is how often scales and codes are fitted again after the first pass.
    """
    return np.concatenate([
        _round(torch.tensor(matrix[first : first + ROWS]), type, hessian, upper, sweeps)
        for first in range(0, len(matrix), ROWS)
    ])


def _round(matrix: torch.Tensor, type: str, hessian: torch.Tensor, upper: torch.Tensor, sweeps: int) -> Packed:
    packed = _in_order(matrix, type, importance(hessian), upper)
    if not sweeps or not bool(hessian.diagonal().any()):
        return packed
    metric = hessian + DAMP * hessian.diagonal().mean() * torch.eye(len(hessian))
    for _ in range(sweeps):
        packed = _fit_codes(matrix, _fit_scales(matrix, packed, type, metric), type, metric)
    return _fit_scales(matrix, packed, type, metric)


def _in_order(matrix: torch.Tensor, type: str, weights: NDArray[np.float32], upper: torch.Tensor) -> Packed:
    work, columns, step = matrix.clone(), matrix.shape[1], block(type)
    out = []
    for start in range(0, columns, step):
        here, rest = slice(start, start + step), slice(start + step, columns)
        parts = take_apart(quantize(work[:, here].numpy(), type, weights[here]), type)
        grid, within = _Grid(parts), upper[here, here]
        wanted = work[:, here].T.contiguous()
        lost = torch.empty_like(wanted)
        for j in range(step):
            codes, value = grid.nearest(j, wanted[j])
            grid.codes[j] = codes
            lost[j] = (wanted[j] - value) / within[j, j]
            if j + 1 < step:
                wanted[j + 1 :] -= within[j, j + 1 :, None] * lost[j]
        work[:, rest] -= lost.T @ upper[here, rest]
        out.append(grid.packed())
    return np.concatenate(out, axis=1)


def _fit_scales(matrix: torch.Tensor, packed: Packed, type: str, metric: torch.Tensor) -> Packed:
    """Least squares for the scales and minima of every row, the codes fixed."""
    parts, per = take_apart(packed, type), block(type)
    rows, columns = matrix.shape
    shapes = [_levels(parts) * _spread(parts.steps)]
    old = [torch.from_numpy(parts.scale)]
    if parts.minimum is not None and parts.lows is not None:
        shapes.append(_spread(parts.lows))
        old.append(torch.from_numpy(parts.minimum))
    blocks, start = columns // per, torch.cat(old, 1)

    def by_block(a: torch.Tensor) -> torch.Tensor:
        return a.view(rows, blocks, per).sum(2)

    target = matrix @ metric
    right = torch.cat([by_block(v * target) for v in shapes], 1)
    system = torch.empty(rows, start.shape[1], start.shape[1])
    for j, v in enumerate(shapes):
        for b in range(blocks):
            part = v[:, b * per : (b + 1) * per] @ metric[b * per : (b + 1) * per]
            system[:, :, j * blocks + b] = torch.cat([by_block(u * part) for u in shapes], 1)
    pull = RIDGE * system.diagonal(dim1=1, dim2=2)
    pull = pull + 1e-3 * pull.mean(1, keepdim=True) + 1e-30
    found = torch.linalg.solve(system + torch.diag_embed(pull), (right + pull * start)[..., None])[..., 0]
    found = torch.where(torch.isfinite(found).all(1, keepdim=True), found, start).clamp(-65504, 65504)
    parts.scale = found[:, :blocks].numpy()
    if parts.minimum is not None:
        parts.minimum = found[:, blocks:].numpy()
    return put_together(parts)


def _fit_codes(matrix: torch.Tensor, packed: Packed, type: str, metric: torch.Tensor) -> Packed:
    """One sweep of coordinate descent over the codes, scales and minima fixed."""
    grid, columns = _Grid(take_apart(packed, type)), matrix.shape[1]
    value = grid.value()
    slope = metric @ (value - matrix.T)
    curvature = metric.diagonal()
    for start in range(0, columns, STRIP):
        end = min(start + STRIP, columns)
        local, moved = slope[start:end].clone(), torch.empty(end - start, len(matrix))
        for j in range(start, end):
            codes, new = grid.nearest(j, value[j] - local[j - start] / curvature[j])
            grid.codes[j] = codes
            moved[j - start] = new - value[j]
            if j + 1 < end:
                local[j + 1 - start :] += metric[j + 1 : end, j, None] * moved[j - start]
        slope += metric[:, start:end] @ moved
    return grid.packed()


class _Grid:
    """The values a packed matrix could take with its scales, column by column: tensors are (columns, rows)."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.layout = parts, layouts()[parts.type]
        per = block(parts.type)
        self.codes = torch.from_numpy(parts.codes).T.contiguous()
        scale = torch.from_numpy(parts.scale).half().float()  # as the file will hold it
        self.unit = (_spread(parts.steps) * scale.repeat_interleave(per, 1)).T.contiguous()
        self.inverse = torch.where(self.unit == 0, 0.0, 1 / self.unit)
        self.offset: torch.Tensor | None = None
        if parts.minimum is not None and parts.lows is not None:
            minimum = torch.from_numpy(parts.minimum).half().float()
            self.offset = (_spread(parts.lows) * minimum.repeat_interleave(per, 1)).T.contiguous()

    def nearest(self, column: int, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and values nearest to `wanted` (rows,) in that column."""
        if self.offset is not None:
            wanted = wanted - self.offset[column]
        place = wanted * self.inverse[column]
        if self.layout.table:
            codes = torch.bucketize(place, MIDDLES)
            value = TABLE[codes] * self.unit[column]
        else:
            codes = (place.round() + self.layout.zero).clamp_(0, self.layout.top)
            value = (codes - self.layout.zero) * self.unit[column]
        return codes.to(torch.uint8), value if self.offset is None else value + self.offset[column]

    def value(self) -> torch.Tensor:
        levels = TABLE[self.codes.long()] if self.layout.table else self.codes.float() - self.layout.zero
        out = levels * self.unit
        return out if self.offset is None else out + self.offset

    def packed(self) -> Packed:
        self.parts.codes = self.codes.T.contiguous().numpy()
        return put_together(self.parts)


TABLE = torch.tensor(LEVELS, dtype=torch.float32)
MIDDLES = (TABLE[1:] + TABLE[:-1]) / 2


def _levels(parts: Parts) -> torch.Tensor:
    codes = torch.from_numpy(parts.codes)
    return TABLE[codes.long()] if layouts()[parts.type].table else codes.float() - layouts()[parts.type].zero


def _spread(steps: NDArray[np.float32]) -> torch.Tensor:
    """(rows, columns / SUB) -> (rows, columns)."""
    return torch.from_numpy(steps).repeat_interleave(SUB, 1)
