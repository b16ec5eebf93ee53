"""Treating every linear layer in one forward pass, each just before it computes, on the inputs it will really get.

All calibration windows pass together, so when a layer is reached its inputs are complete, and whatever came before it
is already treated: no layer runs twice and no input is kept for later. The memory is the model, one layer's
activations and what the treatment needs for one matrix. Layers that share an input (query, key and value; gate and up)
get the same tensor object, so what follows from it can be computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fivefold.techniques._shared.modules import forward, linears

Treat = Callable[[str, Any, torch.Tensor], None]


def treat_in_passing(module: Any, tokens: NDArray[np.int64], treat: Treat) -> dict[str, Any]:
    """Call `treat(name, linear layer, inputs (..., columns))` once each; name -> the layers that were reached."""
    reached: dict[str, Any] = {}

    def before(name: str, part: Any, inputs: torch.Tensor) -> None:
        if name not in reached:
            reached[name] = part
            treat(name, part, inputs)

    handles = [
        part.register_forward_pre_hook(lambda part, args, name=name: before(name, part, args[0]))
        for name, part in linears(module)
    ]
    try:
        forward(module, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return reached


def column_norms(inputs: torch.Tensor) -> torch.Tensor:
    """Root mean square of each column of `inputs` (..., columns), float32."""
    squares = inputs.detach().reshape(-1, inputs.shape[-1]).float().square()
    return squares.mean(0, dtype=torch.float64).sqrt().float()


class JointSquares:
    """Mean of x x^T over the tokens of a layer's inputs, kept for the layers after it that share them."""

    def __init__(self) -> None:
        self._inputs: torch.Tensor | None = None
        self._mean = torch.empty(0, 0)

    def of(self, inputs: torch.Tensor) -> torch.Tensor:
        """`inputs` is (..., columns); float32 (columns, columns)."""
        if inputs is not self._inputs:
            flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
            self._inputs, self._mean = inputs, flat.T @ flat / len(flat)
        return self._mean
