"""Column scales that make a block's rounding error count least.

A block of weights shares a step in proportion to their size. With column j of a matrix multiplied by s_j and its input
divided by it, the step of a block and what an error in it costs become

    step^2 ~ mean_j m_j^2 s_j^2      cost ~ mean_j d_j / s_j^2      loss(s) = sum over blocks of step^2 x cost

with m_j^2 the mean square of the column (rows weighed by what their errors cost) and d_j what an error in column j
costs once the columns after it make up for it (the conditional variance of H, see `feedback`). For one matrix each
block has its closed form, s_j^2 = sqrt(d_j) / m_j. Where several matrices read the same input, or query heads share
values, the scales are shared and the losses add up; in log s the sum is convex (a posynomial), so its minimum is the
only one.

Sources: Nagel et al., Data-Free Quantization, arXiv 1906.04721 (equalization); Lin et al., AWQ, arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fivefold.techniques._shared.feedback import factor
from fivefold.techniques._shared.sensitivity import Curvature

FLOOR = 1e-6
"""Columns that are never used, or all zero, count this share of the mean."""
LARGEST = 7.0
"""Most |log s|: half-precision scales of blocks must hold what becomes of the weights."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Of one matrix: `cost` is d, `squares` is m^2, both (columns,) in float64."""

    cost: torch.Tensor
    squares: torch.Tensor


def columns_of(weight: torch.Tensor, curvature: Curvature) -> Columns:
    """`weight` (rows, columns) has its rows in the curvature's order."""
    mean = curvature.inputs.diagonal().double().mean()
    cost = factor(curvature.inputs).diagonal().double().pow(-2) * mean
    if curvature.outputs is not None:
        cost = cost * factor(curvature.outputs).diagonal().double().pow(-2).mean()
    squares = (curvature.rows[:, None] * weight.float().square()).sum(0).double()
    return Columns(cost=_floored(cost), squares=_floored(squares))


def _floored(values: torch.Tensor) -> torch.Tensor:
    return values.clamp_min(0) + FLOOR * values.mean() + 1e-30


def loss(scales: torch.Tensor, matrices: Sequence[Columns], block: int) -> torch.Tensor:
    """Up to a constant factor, the damage of rounding matrices whose columns are multiplied by `scales`."""
    square = scales.square()
    return torch.stack([
        ((one.squares * square).view(-1, block).mean(1) * (one.cost / square).view(-1, block).mean(1)).sum()
        for one in matrices
    ]).sum()


def best(
    matrices: Sequence[Columns], block: int, *, spread: Callable[[torch.Tensor], torch.Tensor] = lambda s: s,
    free: int | None = None,
) -> tuple[torch.Tensor, float]:
    """Scales (free,), and the loss they leave as a share of that without. `spread` makes them one per column."""
    start = torch.zeros(free or len(matrices[0].cost), dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        before = loss(torch.ones_like(matrices[0].cost), matrices, block)
    search = torch.optim.LBFGS([start], max_iter=400, line_search_fn="strong_wolfe", tolerance_grad=1e-9,
                               tolerance_change=1e-12)

    def value() -> torch.Tensor:
        search.zero_grad()
        share = loss(spread(start.exp()), matrices, block) / before
        share.backward()
        return share

    search.step(value)
    with torch.no_grad():
        found = (start - start.mean()).clamp(-LARGEST, LARGEST).exp()
        left = float(loss(spread(found), matrices, block) / before)
    return (found, left) if left < 1 else (torch.ones_like(found), 1.0)
