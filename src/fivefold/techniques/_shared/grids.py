"""Rounding to a uniform grid: n-bit codes with a scale, and perhaps an offset, per group of neighbouring columns.

    symmetric    w' = s (q - 2^(bits-1))        the largest weight of the group, with its sign, lies on code 0
    otherwise    w' = s q + z                   z = -s x a code, so that zero is on the grid, or the group's own

Scales and offsets are half precision, as every engine here stores them, and codes are rounded against the *stored*
ones. "range" takes them from the extremes of the group and zero, which is then one of the values: the error is at most
s / 2, and small weights, the most frequent, lose least. "fit" minimises sum_j c_j (w_j - w'_j)^2 instead, c_j the
weight of column j: ranges with either or both ends drawn in are tried, scale and offset fitted to the codes by least
squares twice, and the best is kept. An outlier may then be clipped for the sake of all.

Source: the same search, without the weights, is in GPTQ's code (Frantar et al., arXiv 2210.17323) and in ggml.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

How = Literal["range", "fit"]
NARROWER = (1.0, 0.9, 0.8, 0.68)
FITS = 2
"""Least-squares fits, codes rounded anew after each, from every start."""
LARGEST = 65504.0


@dataclass(frozen=True, kw_only=True)
class Grid:
    """`group` 0 is the whole row."""

    bits: int
    group: int
    symmetric: bool

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    @property
    def centre(self) -> int:
        """The code of zero when the grid is symmetric."""
        return 1 << self.bits - 1 if self.symmetric else 0

    def size(self, columns: int) -> int:
        """Columns per group."""
        return self.group or columns


@dataclass(kw_only=True)
class Codes:
    """One rounded matrix: codes (rows, columns) uint8, scale and offset (rows, groups) float32 of half precision."""

    grid: Grid
    codes: Tensor
    scale: Tensor
    offset: Tensor | None

    def matrix(self) -> Tensor:
        """The weights, (rows, columns)."""
        per = self.grid.size(self.codes.shape[1])
        out = (self.codes.float() - self.grid.centre) * self.scale.repeat_interleave(per, 1)
        return out if self.offset is None else out + self.offset.repeat_interleave(per, 1)


def round_to(weight: Tensor, grid: Grid, how: How = "range", columns: Tensor | None = None) -> Codes:
    """Every weight to the nearest point of its group's grid; `weight` is (rows, columns), `columns` weighs columns."""
    rows, width = weight.shape
    cells = weight.float().reshape(rows, -1, grid.size(width))
    importance = None if columns is None else columns.float().view(1, *cells.shape[1:])
    scale, offset = scales(cells, grid, how, importance)
    codes = nearest(cells, scale, offset, grid).to(torch.uint8).view(rows, width)
    return Codes(grid=grid, codes=codes, scale=scale[..., 0], offset=None if offset is None else offset[..., 0])


def nearest(cells: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid) -> Tensor:
    """Codes (as floats) nearest to `cells`; scale and offset broadcast against them. Zero scales give zero's code."""
    place = cells if offset is None else cells - offset
    place = place * torch.where(scale == 0, 0.0, 1 / scale)
    return place.round_().add_(grid.centre).clamp_(0, grid.top)


def scales(
    cells: Tensor, grid: Grid, how: How = "range", importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and offset (None when symmetric) of groups that lie along the last dimension, which is kept as 1."""
    low, high = cells.amin(-1, keepdim=True), cells.amax(-1, keepdim=True)
    if how == "range":
        return _through_zero(low, high, grid)
    scale, offset = _from_range(low, high, grid)
    best = torch.full_like(scale, torch.inf)
    found = scale, offset
    for down, up in _starts(grid):
        tried = _from_range(low * down, high * up, grid)
        for fits in range(FITS + 1):
            if fits:
                tried = _refitted(cells, nearest(cells, *tried, grid), grid, importance)
            error = _error(cells, *tried, grid, importance)
            better = error < best
            best = torch.where(better, error, best)
            found = torch.where(better, tried[0], found[0]), _where(better, tried[1], found[1])
    return found


def _starts(grid: Grid) -> list[tuple[float, float]]:
    """Shares of the lower and of the upper end to start from: both narrower, or one."""
    if grid.bits >= 8:
        return [(1.0, 1.0)]
    both = [(share, share) for share in NARROWER]
    return both if grid.symmetric else [*both, *((s, 1.0) for s in NARROWER[1:]), *((1.0, s) for s in NARROWER[1:])]


def _through_zero(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    if grid.symmetric:
        return _from_range(low, high, grid)
    scale = half((high.clamp_min(0) - low.clamp_max(0)) / grid.top)
    code = (-low.clamp_max(0) / torch.where(scale == 0, 1.0, scale)).round_().clamp_(0, grid.top)
    return scale, half(-code * scale)


def _from_range(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    if grid.symmetric:
        return half(torch.where(high > -low, high, low) / -grid.centre), None
    return half((high - low) / grid.top), half(low)


def _refitted(cells: Tensor, codes: Tensor, grid: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Least squares for scale and offset, the codes fixed."""
    weight = torch.ones(1) if importance is None else importance
    codes = codes - grid.centre

    def total(a: Tensor) -> Tensor:
        return (weight * a).sum(-1, keepdim=True)

    if grid.symmetric:
        return half(total(codes * cells) / total(codes * codes).clamp_min(1e-30)), None
    mass = (weight.expand_as(cells) if importance is not None else torch.ones_like(cells)).sum(-1, keepdim=True)
    middle, centre = total(codes) / mass, total(cells) / mass
    spread = codes - middle
    scale = half(total(spread * (cells - centre)) / total(spread * spread).clamp_min(1e-30))
    return scale, half(centre - scale * middle)


def _error(cells: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, importance: Tensor | None) -> Tensor:
    value = (nearest(cells, scale, offset, grid) - grid.centre) * scale
    lost = (cells - (value if offset is None else value + offset)).square_()
    return (lost if importance is None else lost * importance).sum(-1, keepdim=True)


def _where(better: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    return None if new is None or old is None else torch.where(better, new, old)


def half(values: Tensor) -> Tensor:
    """Float32 numbers that half precision can hold."""
    return values.clamp(-LARGEST, LARGEST).half().float()
