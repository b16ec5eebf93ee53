"""A small predictor of the neurons that will matter to a token: scores = expand (reduce x) + offset.

Neuron i matters by the size of what it adds to the residual stream, |h_i| |down_i|. What is predicted is the square
root of that size: few neurons carry most of the squares, and the root keeps them from being all that the fit sees. The
fit is ridge regression on x of the roots minus their means, cut to `rank` where the predictions lose least,

    C = (X^T X + lambda I)^-1 X^T Y,     reduce = (C V)^T,     expand = V

with V the first `rank` right singular vectors of L^T C, L L^T = X^T X + lambda I. No step is drawn at random: same
tokens, same predictor.

Deja Vu trains such a predictor on yes-or-no labels with the logistic loss. Labels do not tell a neuron that matters a
little from one that matters much; the roots do.

Source: Liu et al., Deja Vu, arXiv 2310.17157, for the predictor; Izenman (1975) for reduced-rank regression.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-2
"""lambda as a share of the mean square of the inputs."""


@dataclass(frozen=True)
class Predictor:
    """reduce (rank, width), expand (neurons, rank), offset (neurons,); float32."""

    reduce: Tensor
    expand: Tensor
    offset: Tensor

    def scores(self, x: Tensor) -> Tensor:
        """(tokens, width) -> (tokens, neurons)."""
        return x @ self.reduce.T @ self.expand.T + self.offset

    def rounded(self) -> Predictor:
        """As it is stored: matrices in bfloat16."""
        return Predictor(self.reduce.bfloat16().float(), self.expand.bfloat16().float(), self.offset)


def sizes(hidden: Tensor, down: Tensor) -> Tensor:
    """|h_i| |down_i|, (tokens, neurons), for `down` of shape (width, neurons); mean 1."""
    found = hidden.abs() * down.norm(dim=0)
    return found / found.mean().clamp_min(1e-30)


def largest(size: Tensor, share: float) -> Tensor:
    """Which neurons are among that share of largest size, per token: (tokens, neurons) of bool."""
    count = max(1, round(share * size.shape[1]))
    out = torch.zeros_like(size, dtype=torch.bool)
    return out.scatter_(1, size.topk(count, 1).indices, True)


def fit(x: Tensor, targets: Tensor, rank: int) -> Predictor:
    """Reduced-rank ridge regression of `targets` (tokens, neurons) on `x` (tokens, width)."""
    mean = targets.mean(0)
    square = (x.T @ x).double()
    square += RIDGE * square.diagonal().mean().clamp_min(1e-30) * torch.eye(len(square), dtype=torch.float64)
    cross = (x.T @ targets - x.sum(0)[:, None] * mean).double()
    root = torch.linalg.cholesky(square)
    seen = torch.linalg.solve_triangular(root, cross, upper=False)  # L^T C
    left = torch.linalg.eigh(seen @ seen.T).eigenvectors[:, -rank:]
    expand = torch.linalg.qr(seen.T @ left).Q
    reduce = torch.linalg.solve_triangular(root.T, seen @ expand, upper=True).T
    return Predictor(reduce.float().contiguous(), expand.float().contiguous(), mean.float())


def recall(chosen: Tensor, wanted: Tensor) -> float:
    """The share of the wanted neurons that were chosen, over all tokens; both (tokens, neurons) of bool."""
    return float((chosen & wanted).sum() / wanted.sum())
