"""GPTQ: columns are rounded one after the other, and the rest of the row makes up for what each one lost.

The error of a row is D H D^T with H = mean(x x^T) over calibration inputs: the mean square change of its output. Once
column j is rounded with error e, the change of the columns not yet rounded that lowers it most is

    w_k += -e U_jk / U_jj,  k > j        (H + damping)^-1 = U^T U, U upper triangular

so one Cholesky factorisation serves every row and every step; the columns beyond the current BLOCK are changed once
per block. With order "columns" the scales of a group are chosen when it is reached, for the weights as moved so far;
with "activation" the columns with the largest inputs go first, while nothing has been moved yet, and the scales are
chosen from the original weights (a group still is neighbouring columns).

`refined` then repeats two steps that cannot raise D H D^T: scales and offsets by least squares with the codes fixed
(one small system per row), and a sweep over the columns with the scales fixed, where every code moves to the one
nearest to its best place given all others, before and after it.

Sources: GPTQ (Frantar et al., arXiv 2210.17323); Optimal Brain Surgeon; QuantEase (Behdin et al., arXiv 2309.01885)
for the sweeps.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fivefold.techniques._shared.feedback import factor
from fivefold.techniques._shared.grids import Codes, Grid, How, half, nearest, scales

Order = Literal["columns", "activation"]
BLOCK = 128
DAMP = 0.01
RIDGE = 1e-4
"""Pull of fitted scales towards those before, as a share of the system's own diagonal."""
NUMBERS = 1 << 25
"""Floats of one batch of least-squares systems."""


def solve(
    weight: Tensor, hessian: Tensor, grid: Grid, *, order: Order = "columns", how: How = "fit", sweeps: int = 0,
    damp: float = DAMP,
) -> Codes:
    """`weight` (rows, columns) on the grid; `hessian` is (columns, columns)."""
    weight = weight.float()
    if not bool(hessian.diagonal().any()):
        hessian = torch.eye(len(hessian))
    metric = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian))
    done = _in_order(weight, metric, grid, order, how)
    for _ in range(sweeps):
        done = swept(refitted(done, weight, metric), weight, metric)
    return refitted(done, weight, metric) if sweeps else done


def _in_order(weight: Tensor, metric: Tensor, grid: Grid, order: Order, how: How) -> Codes:
    rows, width = weight.shape
    size = grid.size(width)
    importance = metric.diagonal()
    place = torch.arange(width)
    fixed = order == "activation" or grid.group == 0
    if order == "activation":
        place = importance.argsort(descending=True, stable=True)
    upper = factor(metric[place][:, place], 0.0)
    work = weight.T[place].contiguous()
    codes = torch.empty(width, rows, dtype=torch.uint8)
    scale, offset = torch.empty(width // size, rows), None if grid.symmetric else torch.empty(width // size, rows)

    def choose(groups: slice, columns: Tensor, weights: Tensor) -> None:
        cells = columns.T.reshape(rows, -1, size)
        found = scales(cells, grid, how, weights.view(1, -1, size))
        scale[groups] = found[0][..., 0].T
        if offset is not None and found[1] is not None:
            offset[groups] = found[1][..., 0].T

    if fixed:
        choose(slice(None), weight.T, importance)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        lost = torch.empty(end - start, rows)
        for j in range(start, end):
            group = int(place[j]) // size
            if not fixed and j % size == 0:
                choose(slice(group, group + 1), work[j : j + size], importance[j : j + size])
            zero = None if offset is None else offset[group]
            found = nearest(work[j], scale[group], zero, grid)
            codes[place[j]] = found.to(torch.uint8)
            value = (found - grid.centre) * scale[group]
            lost[j - start] = (work[j] - (value if zero is None else value + zero)) / upper[j, j]
            if j + 1 < end:
                work[j + 1 : end] -= upper[j, j + 1 : end, None] * lost[j - start]
        if end < width:
            work[end:] -= upper[start:end, end:].T @ lost
    return Codes(grid=grid, codes=codes.T.contiguous(), scale=scale.T.contiguous(),
                 offset=None if offset is None else offset.T.contiguous())


def refitted(done: Codes, weight: Tensor, metric: Tensor) -> Codes:
    """Scales and offsets by least squares in the metric, codes fixed; rows that would get worse stay."""
    groups = done.scale.shape[1]
    unknown = groups if done.offset is None else 2 * groups
    step = max(1, NUMBERS // unknown**2)
    parts = [_refit_rows(done, weight, metric, slice(r, r + step)) for r in range(0, len(weight), step)]
    found = Codes(grid=done.grid, codes=done.codes, scale=torch.cat([p[0] for p in parts]),
                  offset=None if done.offset is None else torch.cat([p[1] for p in parts]))
    worse = (_row_error(found, weight, metric) > _row_error(done, weight, metric))[:, None]
    found.scale = torch.where(worse, done.scale, found.scale)
    if found.offset is not None and done.offset is not None:
        found.offset = torch.where(worse, done.offset, found.offset)
    return found


def _refit_rows(done: Codes, weight: Tensor, metric: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    codes = done.codes[rows].float() - done.grid.centre
    count, width = codes.shape
    size = done.grid.size(width)
    groups = width // size
    shapes, start = [codes], [done.scale[rows]]
    if done.offset is not None:
        shapes, start = [codes, torch.ones_like(codes)], [done.scale[rows], done.offset[rows]]

    def by_group(a: Tensor) -> Tensor:
        return a.view(count, groups, size).sum(2)

    old = torch.cat(start, 1)
    target = weight[rows] @ metric
    right = torch.cat([by_group(v * target) for v in shapes], 1)
    system = torch.empty(count, old.shape[1], old.shape[1])
    for k, v in enumerate(shapes):
        for g in range(groups):
            columns = slice(g * size, (g + 1) * size)
            part = v[:, columns] @ metric[columns]
            system[:, :, k * groups + g] = torch.cat([by_group(u * part) for u in shapes], 1)
    diagonal = system.diagonal(dim1=1, dim2=2)
    pull = RIDGE * diagonal + 1e-6 * diagonal.mean(1, keepdim=True) + 1e-30
    found = torch.linalg.solve(system + torch.diag_embed(pull), (right + pull * old)[..., None])[..., 0]
    found = half(torch.where(torch.isfinite(found).all(1, keepdim=True), found, old))
    return found[:, :groups], found[:, groups:]


def swept(done: Codes, weight: Tensor, metric: Tensor) -> Codes:
    """One sweep of coordinate descent over the codes, scales fixed."""
    grid, width = done.grid, weight.shape[1]
    size = grid.size(width)
    value = done.matrix().T.contiguous()
    codes = done.codes.T.contiguous()
    scale, offset = done.scale.T.contiguous(), None if done.offset is None else done.offset.T.contiguous()
    slope = metric @ (value - weight.T)
    curvature = metric.diagonal()
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        local, moved = slope[start:end].clone(), torch.empty(end - start, len(weight))
        for j in range(start, end):
            zero = None if offset is None else offset[j // size]
            found = nearest(value[j] - local[j - start] / curvature[j], scale[j // size], zero, grid)
            new = (found - grid.centre) * scale[j // size]
            moved[j - start] = (new if zero is None else new + zero) - value[j]
            codes[j] = found.to(torch.uint8)
            if j + 1 < end:
                local[j + 1 - start :] += metric[j + 1 : end, j, None] * moved[j - start]
        slope += metric[:, start:end] @ moved
    return Codes(grid=grid, codes=codes.T.contiguous(), scale=done.scale, offset=done.offset)


def _row_error(done: Codes, weight: Tensor, metric: Tensor) -> Tensor:
    error = done.matrix() - weight
    return ((error @ metric) * error).sum(1)
