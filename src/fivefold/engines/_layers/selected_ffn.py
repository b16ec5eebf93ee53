"""Gated feed-forwards of which each token computes only some neurons, chosen by the gate or by a small predictor.

    y = sum over chosen i of act(gate_i x) (up_i x) down_i

rank = 0: chosen where |act(gate_i x)| > threshold; gate is read whole, up and down only for the chosen.
rank > 0: chosen where (expand^T reduce x)_i + offset_i > threshold, rank numbers in between, before any of gate, up and
down is read: all three only for the chosen.

The matrices are stored by neuron (`gate`, `up`, `down`, of shape (ffn, width)), so a neuron that is not chosen skips
whole runs of bytes; `reduce` is (rank, width) and `expand` (rank, ffn). All are bfloat16 but `offset` (ffn,), float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.engines._layers._gather import ACTIVATIONS, FEW, HALF, STORED, kernels, matrix, number, readable, without

TENSORS = ("gate", "up", "down", "reduce", "expand", "offset")


class SelectedFeedForward(nn.Module):
    """(..., width) -> (..., width), in the dtype of its input. `kept` of `seen` neurons were computed."""

    stored = STORED

    def __init__(self, tensors: Mapping[str, Tensor], act: Any, activation: str, threshold: float) -> None:
        super().__init__()
        self.ffn, self.width = tensors["down"].shape
        self.act, self.activation, self.threshold = act, activation, threshold
        self.rank = len(tensors["reduce"]) if "reduce" in tensors else 0
        for name, tensor in tensors.items():
            setattr(self, name, nn.Buffer(tensor))
        self.kept = self.seen = 0
        self._kernel = kernels().neuron_ffn

    def forward(self, x: Tensor) -> Tensor:
        given, count = readable(x), x.numel() // self.width
        if count > FEW:
            return self._densely(given).to(x.dtype)
        y = torch.empty_like(given)
        place = [b.data_ptr() for name in TENSORS if (b := self._buffers.get(name)) is not None]
        self.kept += self._kernel(
            given.data_ptr(), HALF[given.dtype], count, self.width, self.ffn, *place[:3], ACTIVATIONS[self.activation],
            self.threshold, self.rank, *(place[3:] or [None] * 3), y.data_ptr(), torch.get_num_threads(),
        )
        self.seen += count * self.ffn
        return y.to(x.dtype)

    def chosen(self, x: Tensor) -> Tensor:
        """Which neurons each of (..., width) computes, (..., ffn) of bool; only for a layer with a predictor."""
        low = x.float() @ self.get_buffer("reduce").float().T
        return low @ self.get_buffer("expand").float() + self.get_buffer("offset") > self.threshold

    def _densely(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_buffer(name).to(x.dtype) for name in ("gate", "up", "down"))
        a = self.act(x @ gate.T)
        gone = ~self.chosen(x) if self.rank else a.abs() <= self.threshold
        return without(a * (x @ up.T), gone) @ down

    def extra_repr(self) -> str:
        return f"{self.width}, {self.ffn}, threshold={self.threshold:.3g}, rank={self.rank}"


def build(
    old: nn.Module, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], dtype: torch.dtype
) -> SelectedFeedForward:
    ffn, width = old.get_parameter("gate_proj.weight").shape
    found = {name: matrix(tensors, name, ffn, width) for name in ("gate", "up", "down")}
    if rank := int(settings["rank"]):
        found["reduce"], found["expand"] = matrix(tensors, "reduce", rank, width), matrix(tensors, "expand", rank, ffn)
        found["offset"] = tensors["offset"].float().contiguous()
        if tuple(found["offset"].shape) != (ffn,):
            raise ValueError("offset")
    return SelectedFeedForward(found, old.act_fn, settings["activation"], number(settings, "threshold"))
