"""Linear layers that skip inputs near zero, and the weights these would have been multiplied with.

    y = sum over j with |x_j| > threshold of x_j W[:, j] + bias

The matrix is stored by input (`columns`, shape (in, out), bfloat16), so that an input that is skipped skips one run of
bytes. Every row of activations keeps its own inputs (see `_gather`). With threshold 0 it is the dense layer.

`<module>.weight` becomes `.columns`; a bias stays beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.engines._layers._gather import FEW, HALF, STORED, cut, kernels, matrix, number, readable

TENSORS = ("columns", "bias")


class ThresholdedLinear(nn.Module):
    """(..., in) -> (..., out), in the dtype of its input. `kept` of `seen` inputs were used since it was made."""

    stored = STORED

    def __init__(self, columns: Tensor, bias: Tensor | None, threshold: float) -> None:
        super().__init__()
        self.in_features, self.out_features = columns.shape
        self.columns, self.threshold = nn.Buffer(columns), threshold
        self.bias = None if bias is None else nn.Buffer(bias.float())
        self._kernel = kernels().gather_linear
        self.kept = self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        given, count = readable(x), x.numel() // self.in_features
        if count > FEW:
            return self._densely(given).to(x.dtype)
        y = given.new_empty((*x.shape[:-1], self.out_features))
        bias = None if self.bias is None else self.bias.data_ptr()
        self.kept += self._kernel(
            given.data_ptr(), HALF[given.dtype], count, self.in_features, self.threshold, self.columns.data_ptr(),
            self.out_features, bias, y.data_ptr(), torch.get_num_threads(),
        )
        self.seen += given.numel()
        return y.to(x.dtype)

    def _densely(self, x: Tensor) -> Tensor:
        y = cut(x, self.threshold) @ self.columns.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, threshold={self.threshold:.3g}"


def build(
    old: nn.Module, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], dtype: torch.dtype
) -> ThresholdedLinear:
    weight = old.get_parameter("weight")
    inputs, outputs = weight.shape[::-1] if isinstance(old, nn.Linear) else weight.shape
    columns = matrix(tensors, "columns", inputs, outputs)
    bias = tensors.get("bias")
    if (bias is None) != (getattr(old, "bias", None) is None) or (bias is not None and tuple(bias.shape) != (outputs,)):
        raise ValueError("bias")
    return ThresholdedLinear(columns, bias, number(settings, "threshold"))
