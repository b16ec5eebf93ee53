"""A matrix seen through a few directions of its shorter side: what GaLore and APOLLO share.

    tall (rows >= columns)   low = G B     (rows, rank)      back = low B'
    wide                     low = B' G    (rank, columns)   back = B low         B (shorter side, rank)

Rows are taken in slabs, so beside a gradient in bfloat16 nothing of its size is made in float32.
"""

from __future__ import annotations

import torch

from fivefold.training.optimizer import seeded, slabs

MORE, ROUNDS = 8, 4


def tall(shape: tuple[int, ...]) -> bool:
    return shape[0] >= shape[1]


def low_shape(shape: tuple[int, ...], rank: int) -> tuple[int, int]:
    return (shape[0], rank) if tall(shape) else (rank, shape[1])


def seen(gradient: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The gradient in the directions of `basis`, float32."""
    shape = tuple(gradient.shape)
    low = torch.zeros(low_shape(shape, basis.shape[1]), device=gradient.device)
    for part in slabs(shape):
        if tall(shape):
            torch.mm(gradient[part].float(), basis, out=low[part])
        else:
            low.addmm_(basis[part].T, gradient[part].float())
    return low


def back(low: torch.Tensor, basis: torch.Tensor, part: slice, is_tall: bool) -> torch.Tensor:
    """Rows `part` of the matrix that `low` stands for."""
    return low[part] @ basis.T if is_tall else basis[part] @ low


def leading(gradient: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    """Orthonormal (shorter side, rank): the leading singular vectors, by subspace iteration from a seeded start.

    The iteration runs on the shorter side's Gram matrix: each round squares the ratio of the singular values.
    """
    shape = tuple(gradient.shape)
    gram = torch.zeros(min(shape), min(shape), device=gradient.device)
    scale = 1 / max(float(gradient.abs().max()), torch.finfo(torch.float32).tiny)
    wide = gradient if tall(shape) else gradient.T
    for part in slabs(tuple(wide.shape)):
        rows = wide[part].float() * scale
        gram.addmm_(rows.T, rows)
    start = torch.randn(len(gram), min(len(gram), rank + MORE), generator=seeded(step, *shape))
    found = start.to(gradient.device)
    for _ in range(ROUNDS):
        found = torch.linalg.qr(gram @ found).Q
    _, turned = torch.linalg.eigh(found.T @ gram @ found)
    return found @ turned[:, -rank:].flip(1)


def random(shape: tuple[int, ...], rank: int, epoch: int) -> torch.Tensor:
    """Gaussian (shorter side, rank) that keeps lengths on average; the same for the same epoch and shape."""
    return torch.randn(min(shape), rank, generator=seeded(epoch, *shape)) / rank**0.5
