"""Choosing which weights become zero, and writing what is left.

Where the zeros may lie is a *pattern*: anywhere in what is compared (a matrix, a row, a block of columns), or n of
every m neighbours in a row ("2:4", "4:8"), which sparse tensor cores compute with. The share is exact: of N
compared weights floor(sparsity N) go, ties in the order of their places.
"""

from __future__ import annotations

from typing import Any

import torch

from fivefold.errors import Misfit
from fivefold.model import Model


def smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` smallest of all `scores`."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.reshape(-1).kthvalue(count).values
    mask = scores < limit
    ties = (scores == limit).nonzero()[: count - int(mask.sum())]
    mask[ties.unbind(1)] = True
    return mask


def smallest_in_rows(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` smallest of every row of `scores` (rows, columns)."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.argsort(dim=1, stable=True)[:, :count], True)


def smallest_of_groups(scores: torch.Tensor, pattern: str) -> torch.Tensor:
    """True at the n smallest of every m neighbours of a row; `pattern` is "n:m". Raises Misfit when m does not fit."""
    gone, size = map(int, pattern.split(":"))
    rows, columns = scores.shape
    if columns % size:
        raise Misfit(f"a pattern of {pattern} needs rows of a multiple of {size}, not {columns}; use another pattern")
    return smallest_in_rows(scores.reshape(-1, size), gone).view(rows, columns)


def pruned_model(model: Model, technique: str, module: Any, parts: dict[str, Any]) -> Model:
    """`model` with the weights of `parts` (name -> linear layer of `module`), and a sentence that counts the zeros."""
    from fivefold.techniques._shared.modules import linears, rewritten, stored_tensors
    from fivefold.training.module import stored_name

    stored = stored_tensors(model)
    tensors: dict[str, Any] = dict(stored)
    zeros = weights = 0
    for name, part in parts.items():
        place = stored_name(module, stored, f"{name}.weight")
        tensors[place] = part.weight.data.to(stored[place].torch().dtype)
        zeros += int((tensors[place] == 0).sum())
        weights += tensors[place].numel()
    found = sum(1 for _ in linears(module))
    return rewritten(model, technique, tensors).covered(
        f"{technique}: {len(parts)} of {found} linear layers, {zeros} of {weights} weights are 0;"
        " embedding and head kept"
    )
