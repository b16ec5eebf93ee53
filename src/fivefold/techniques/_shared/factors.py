"""The best product of two thin matrices for the inputs a layer really gets.

With C = mean(x x^T) = L L^T (Cholesky), a changed matrix errs by E |(W - W') x|^2 = |(W - W') L|^2 on average, the sum
of squares of a matrix. So the best W' of rank r truncates the singular value decomposition W L = U S V^T:

    W' = U_r S_r V_r^T L^-1,    error = sum of the S_k^2 cut off,    r (m + n) numbers for m n

U_r alone is enough, as U_r S_r V_r^T L^-1 = U_r (U_r^T W): no inverse. The smaller Gram matrix is decomposed: of
m <= n rows, W C W^T = U S^2 U^T; else (W L)^T (W L) = V S^2 V^T, and U_r is an orthogonal basis of W L V_r. C from few
tokens is singular; for L, RIDGE of its mean diagonal is added to its own.

Source: SVD-LLM (Wang et al., arXiv 2403.07378).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

RIDGE = 1e-10


def rank_of(rows: int, columns: int, removed: float) -> int:
    """The largest rank, 1 at least, that leaves at most a share 1 - `removed` of the weights."""
    return max(1, int((1 - removed) * rows * columns / (rows + columns) + 1e-9))


def factor(
    weight: torch.Tensor, moment: torch.Tensor | None, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(down (rank, columns), up (rows, rank), singular values of W L, descending) of `weight` (rows, columns); float64.

    `moment` is C (columns, columns); None weighs all inputs alike, the plain decomposition.
    """
    weight = weight.double()
    rows, columns = weight.shape
    if rows <= columns:
        values, vectors = _descending(weight @ weight.T if moment is None else weight @ moment.double() @ weight.T)
        up = vectors[:, :rank]
    else:
        whitened = weight if moment is None else weight @ cholesky(moment)
        values, vectors = _descending(whitened.T @ whitened)
        up = torch.linalg.qr(whitened @ vectors[:, :rank]).Q
    return up.T @ weight, up, values


def _descending(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square roots of the eigenvalues, and eigenvectors in columns."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)


def cholesky(moment: torch.Tensor) -> torch.Tensor:
    """L, lower triangular, of C with its ridge."""
    moment = moment.double()
    ridge = RIDGE * float(moment.diagonal().mean()) or 1.0
    return torch.linalg.cholesky(moment + ridge * torch.eye(len(moment), dtype=torch.float64))


class Moments:
    """Running sums of x x^T per linear layer, float64. Layers that read the same tensor share one sum."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}
        self._last: tuple[Any, str] = (None, "")

    def add(self, name: str, inputs: torch.Tensor) -> None:
        tensor, first = self._last
        if tensor is inputs and name not in self.sums:
            self.sums[name], self.rows[name] = self.sums[first], self.rows[first]
            return
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).double()
        found = flat.T @ flat
        self.sums[name] = self.sums[name] + found if name in self.sums else found
        self.rows[name] = self.rows.get(name, 0) + len(flat)
        self._last = (inputs, name)

    def mean(self, name: str) -> torch.Tensor:
        return self.sums[name] / self.rows[name]


@contextmanager
def moments(parts: Mapping[str, Any]) -> Iterator[Moments]:
    """While open, every forward pass through one of `parts` (name -> module) adds its inputs."""
    found = Moments()
    handles = [
        part.register_forward_pre_hook(lambda _, args, name=name: found.add(name, args[0]))
        for name, part in parts.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
