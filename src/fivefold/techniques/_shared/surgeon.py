"""Removing weights of a matrix and letting the others make up for it: the layer's least squares under a mask.

A row w of a linear layer costs (w - w0) H (w - w0)^T with H the mean of x x^T. Taking out weight j alone costs
w_j^2 / [H^-1]_jj, and the best change of the others is -w_j [H^-1]_j: / [H^-1]_jj (Optimal Brain Surgeon). Done
exactly, every row would need an inverse of its own after every weight. Going through the columns in one fixed order,
with H^-1 = U^T U (U upper triangular) one factor serves all rows, because the rows of U are what the inverse is reduced
to (SparseGPT):

    error_j = w_j / U_jj,    w_k -= error_j U_jk   for k > j,    lost: error_j^2 = w_j^2 / U_jj^2

The columns before j can no longer help. `refined` lets them: with the zeros fixed, a row is a linear least squares in
its remaining weights, solved for all rows at once by conjugate gradients with the diagonal of H as preconditioner.

Sources: Frantar and Alistarh, SparseGPT, arXiv 2301.00774; Hassibi and Stork, Optimal Brain Surgeon, 1993; Meng et
al., ALPS, arXiv 2406.07831, for conjugate gradients after the mask.
"""

from __future__ import annotations

import torch

from fivefold.techniques._shared.feedback import factor
from fivefold.techniques._shared.zeros import smallest, smallest_of_groups

BLOCK = 128
FREE = "block"


def sparse_solution(
    weight: torch.Tensor, hessian: torch.Tensor, sparsity: float, pattern: str = FREE, *, damp: float = 0.01,
    refine: int = 0,
) -> torch.Tensor:
    """A matrix (rows, columns) near `weight` in the metric `hessian`, of which floor(sparsity x its size) are zero.

    "block" compares the weights of BLOCK columns and all rows with each other, "n:m" those of m neighbours in a row.
    `refine` is how many steps of conjugate gradients fit the remaining weights afterwards.
    """
    weight = weight.float()
    if pattern == FREE and int(sparsity * weight.numel()) == 0:
        return weight
    mean = float(hessian.diagonal().mean())
    pruned = _sweep(weight, factor(hessian, damp), sparsity, pattern)
    if not refine or mean <= 0:
        return pruned
    return refined(pruned, weight, hessian + damp * mean * torch.eye(len(hessian)), refine)


def _sweep(weight: torch.Tensor, upper: torch.Tensor, sparsity: float, pattern: str) -> torch.Tensor:
    rows, columns = weight.shape
    work = weight.T.contiguous()
    removed = 0
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        here, within = work[start:end], upper[start:end, start:end]
        power = within.diagonal().square()[:, None]
        gone = torch.zeros_like(here, dtype=torch.bool)
        if pattern == FREE:
            count = int(sparsity * rows * end) - removed
            gone = smallest(here.square() / power, count)
            removed += count
        lost = torch.empty_like(here)
        for j in range(end - start):
            if pattern != FREE and j % (size := int(pattern.split(":")[1])) == 0:
                group = slice(j, j + size)
                gone[group] = smallest_of_groups((here[group].square() / power[group]).T, pattern).T
            lost[j] = torch.where(gone[j], here[j] / within[j, j], 0.0)
            here[j].masked_fill_(gone[j], 0.0)
            here[j + 1 :] -= within[j, j + 1 :, None] * lost[j]
        work[end:] -= upper[start:end, end:].T @ lost
    return work.T.contiguous()


def refined(pruned: torch.Tensor, weight: torch.Tensor, metric: torch.Tensor, steps: int) -> torch.Tensor:
    """The zeros of `pruned` kept, its other weights moved to lessen (w - w0) metric (w - w0)^T, row by row."""
    kept = (pruned != 0).float()
    inverse = 1 / metric.diagonal()
    found = pruned.clone()
    residual = (weight - pruned) @ metric * kept
    direction = residual * inverse
    power = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        image = direction @ metric * kept
        length = power / (direction * image).sum(1, keepdim=True).clamp_min(1e-30)
        found += length * direction
        residual -= length * image
        conditioned = residual * inverse
        after = (residual * conditioned).sum(1, keepdim=True)
        direction = conditioned + after / power.clamp_min(1e-30) * direction
        power = after
    return found
