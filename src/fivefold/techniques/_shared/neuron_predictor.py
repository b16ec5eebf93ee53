"""A small predictor of the neurons that will matter to a token: scores = expand (reduce x) + offset.

What is predicted is whether neuron i is among the `wanted` most important of its layer for this token, importance being
the size of what it adds to the residual stream, |h_i| |down_i|. It starts from least squares: ridge regression of these
labels (minus their means) on x, cut to `rank` where the predictions lose least. That is the eigenvectors of
P^T P, with P the predictions,

    C = (X^T X + lambda I)^-1 X^T Y,   P = X C,   reduce = (C V)^T,   expand = V     (V: the first `rank` eigenvectors)

From there a few passes of Adam lower the logistic loss. The batches are drawn with a fixed seed: same tokens, same
predictor.

Source: Liu et al., Deja Vu, arXiv 2310.17157, for the predictor; Izenman (1975) for reduced-rank regression.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-2
"""lambda as a share of the mean square of the inputs."""
BATCH = 256
RATE = 2e-3
SLOPE = 4.0
"""Logits per unit of a least-squares label: 0 to 1 becomes -2 to 2."""


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


def important(hidden: Tensor, down: Tensor, wanted: float) -> Tensor:
    """Which neurons are among the `wanted` share of largest |h_i| |down_i|, per token: (tokens, neurons) of bool.

    `down` is (width, neurons).
    """
    size = hidden.abs() * down.norm(dim=0)
    count = max(1, round(wanted * size.shape[1]))
    out = torch.zeros_like(size, dtype=torch.bool)
    return out.scatter_(1, size.topk(count, 1).indices, True)


def least_squares(x: Tensor, labels: Tensor, rank: int) -> Predictor:
    """Reduced-rank ridge regression of `labels` (tokens, neurons), 0 or 1, on `x` (tokens, width)."""
    mean = labels.float().mean(0)
    square = (x.T @ x).double()
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    cross = (x.T @ (labels.float() - mean)).double()
    solved = torch.linalg.solve(square, cross)
    spread = cross.T @ solved  # P^T P up to the ridge
    vectors = torch.linalg.eigh(spread).eigenvectors[:, -rank:]
    return Predictor((solved @ vectors).T.float().contiguous(), vectors.float().contiguous(), mean)


def fit(x: Tensor, labels: Tensor, rank: int, passes: int) -> Predictor:
    """`least_squares`, then `passes` over the tokens of Adam on the logistic loss."""
    with torch.inference_mode(False), torch.enable_grad():
        x, labels = x.clone(), labels.clone()
        start = least_squares(x, labels, rank)
        parts = [
            (start.reduce * SLOPE**0.5).requires_grad_(), (start.expand * SLOPE**0.5).requires_grad_(),
            torch.logit(start.offset.clamp(0.01, 0.99)).requires_grad_(),
        ]
        generator = torch.Generator().manual_seed(0)
        steps = passes * -(-len(x) // BATCH)
        adam = torch.optim.Adam(parts, lr=RATE)
        decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.05, max(1, steps))
        for _ in range(passes):
            for batch in torch.randperm(len(x), generator=generator).split(BATCH):
                adam.zero_grad()
                scores = Predictor(*parts).scores(x[batch])
                torch.nn.functional.binary_cross_entropy_with_logits(scores, labels[batch].float()).backward()
                adam.step()
                decay.step()
        return Predictor(*(part.detach() for part in parts))


def recall(chosen: Tensor, wanted: Tensor) -> float:
    """The share of the wanted neurons that were chosen, over all tokens; both (tokens, neurons) of bool."""
    return float((chosen & wanted).sum() / wanted.sum())
