"""Gated feed-forwards that skip inputs and neurons near zero, computed in one call.

    h = act(gate x') * up x'      with x' = x where |x_j| > threshold, else 0
    y = down h'                   with h' = h where |h_i| > threshold_down, else 0

The same as three `thresholded` layers, of which gate and up share their kept inputs: both are stored by input side by
side (`gate_up`, shape (width, 2 ffn)), so a kept input reads one run of bytes, and h never passes through Python.
`down` is stored by neuron, shape (ffn, width). Both are bfloat16; h is rounded nowhere in between.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.engines._layers._gather import ACTIVATIONS, FEW, HALF, STORED, cut, kernels, matrix, number, readable

TENSORS = ("gate_up", "down")


class ThresholdedFeedForward(nn.Module):
    """(..., width) -> (..., width), in the dtype of its input. `kept` counts inputs and neurons used of `seen` rows."""

    stored = STORED

    def __init__(
        self, gate_up: Tensor, down: Tensor, act: Any, activation: str, threshold: float, threshold_down: float
    ) -> None:
        super().__init__()
        self.ffn, self.width = down.shape
        self.gate_up, self.down, self.act = nn.Buffer(gate_up), nn.Buffer(down), act
        self.activation, self.threshold, self.threshold_down = activation, threshold, threshold_down
        self.kept, self.seen = (ctypes.c_int64 * 2)(), 0
        self._kernel = kernels().gather_ffn
        self._rest = ACTIVATIONS[activation], threshold, threshold_down

    def forward(self, x: Tensor) -> Tensor:
        given, count = readable(x), x.numel() // self.width
        if count > FEW:
            return self._densely(given).to(x.dtype)
        y = torch.empty_like(given)
        self._kernel(
            given.data_ptr(), HALF[given.dtype], count, self.width, self.ffn, self.gate_up.data_ptr(),
            self.down.data_ptr(), *self._rest, y.data_ptr(), torch.get_num_threads(), self.kept,
        )
        self.seen += count
        return y.to(x.dtype)

    def _densely(self, x: Tensor) -> Tensor:
        gate, up = (cut(x, self.threshold) @ self.gate_up.to(x.dtype)).split(self.ffn, -1)
        return cut(self.act(gate) * up, self.threshold_down) @ self.down.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, {self.ffn}, thresholds={self.threshold:.3g}, {self.threshold_down:.3g}"


def build(
    old: nn.Module, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], dtype: torch.dtype
) -> ThresholdedFeedForward:
    ffn, width = old.get_parameter("gate_proj.weight").shape
    return ThresholdedFeedForward(
        matrix(tensors, "gate_up", width, 2 * ffn), matrix(tensors, "down", ffn, width), old.act_fn,
        settings["activation"], number(settings, "threshold"), number(settings, "threshold_down"),
    )
