"""A linear layer as the product of two thin matrices: y = up (down x) + bias, down (r, columns), up (rows, r).

It holds r (rows + columns) numbers instead of rows x columns and does as many multiplications, so both fall when
r < rows columns / (rows + columns). Two smaller products have more overhead than one: a single token gains when
reading weights dominates, long prompts when arithmetic does.

`<module>.weight` is replaced by `.down` and `.up`; a bias stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

TENSORS = ("down", "up", "bias")


class LowRankLinear(nn.Module):
    """(..., columns) -> (..., rows)."""

    stored = "low_rank"

    def __init__(self, down: Tensor, up: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1]:
            raise ValueError(f"{tuple(up.shape)} and {tuple(down.shape)} are no factors of one matrix")
        self.down, self.up = nn.Buffer(down), nn.Buffer(up)
        self.bias = None if bias is None else nn.Buffer(bias)
        self.in_features, self.out_features = down.shape[1], len(up)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={len(self.down)}"


def build(
    old: Any, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], dtype: torch.dtype
) -> LowRankLinear:
    """`settings` holds the rank. Conv1D keeps its matrix as (columns, rows)."""
    shape = old.weight.shape if isinstance(old, nn.Linear) else old.weight.shape[::-1]
    bias = tensors.get("bias")
    built = LowRankLinear(
        tensors["down"].to(dtype), tensors["up"].to(dtype), None if bias is None else bias.to(dtype)
    )
    if (built.out_features, built.in_features) != tuple(shape) or len(built.down) != settings["rank"]:
        raise ValueError(settings["rank"])
    return built
