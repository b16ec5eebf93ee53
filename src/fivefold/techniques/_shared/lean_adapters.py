"""What peft's layers compute, in the lean way of `training.lean`: same function, same gradients, less kept.

    DoRA      y = g * (x W' + s (x A') B') + b        g = m / |W + s B A| by row, its norm without gradient
    AdaLoRA   y = x W' + b + (s / r) (x (A * E)') B'
    IA3       y = l * (x W' + b), before a down projection y = (l * x) W' + b
    NF4       W is made from its 4 bits in each pass and kept in none

The row norms of W + s B A come from |W|^2 + 2 s (W A') * B + s^2 (B A A') * B, without the sum as a matrix. The factors
g and l are near 1, where bfloat16 has steps of 1/128: they stay in float32, and are applied in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fivefold.techniques._shared.modules import matrix
from fivefold.training import lean

NAME = "default"


class _Scaled(torch.autograd.Function):
    """x (..., d) times gain (d,). Keeps the way back to x, or else the product, which what follows often keeps too."""

    @staticmethod
    def forward(ctx, x, gain, mark):  # type: ignore[no-untyped-def]
        out = (x * gain).to(x.dtype)
        ctx.again, sources = mark or (None, ())
        ctx.save_for_backward(None if mark else out, gain, *sources)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        out, gain, *sources = ctx.saved_tensors
        of_gain = None
        if ctx.needs_input_grad[1]:
            x = ctx.again(*sources) if out is None else out
            of_gain = (grad.float() * x).flatten(0, -2).sum(0)
            if out is not None:
                of_gain /= torch.where(gain == 0, 1.0, gain)
        return (grad * gain).to(grad.dtype), of_gain, None


def scaled(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """x times a gain along the last dimension, in float32, in the dtype of x."""
    out: torch.Tensor = _Scaled.apply(x, gain, getattr(x, lean._MARK, None))
    return out


def use(layer: Any, forward: Callable[..., torch.Tensor]) -> None:
    """Let a layer of peft compute `forward(layer, x)`."""
    layer.forward = forward.__get__(layer)


def parts(layer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """(W (outputs, inputs), A, B, scale) of a layer with a low-rank adapter."""
    return matrix(layer.get_base_layer()), layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.scaling[NAME]


def norms(squares: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Row norms of W + scale B A in float32; `squares` are the squared row norms of W."""
    cross = (w @ a.T.to(w.dtype)).float() * b
    return (squares + 2 * scale * cross.sum(1) + scale**2 * ((b @ (a @ a.T)) * b).sum(1)).clamp_min(0).sqrt()


def dora(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """`layer.squares` holds the squared row norms of W."""
    w, a, b, scale = parts(layer)
    with torch.no_grad():
        length = norms(layer.squares, w, a, b, scale)
    y = scaled(lean.linear(x, w, None, a, b, scale), layer.lora_magnitude_vector[NAME].weight / length)
    bias = layer.get_base_layer().bias
    return y if bias is None else y + bias


def adalora(layer: Any, x: torch.Tensor) -> torch.Tensor:
    base = layer.get_base_layer()
    scale = layer.scaling[NAME] / (float(layer.ranknum[NAME]) + 1e-5)
    return lean.linear(x, matrix(base), base.bias, layer.lora_A[NAME] * layer.lora_E[NAME], layer.lora_B[NAME], scale)


def ia3(layer: Any, x: torch.Tensor) -> torch.Tensor:
    base, gain = layer.get_base_layer(), layer.ia3_l[NAME].flatten()
    if layer.is_feedforward:
        return lean.linear(scaled(x, gain), matrix(base), base.bias)
    return scaled(lean.linear(x, matrix(base), base.bias), gain)


def nf4(layer: Any, x: torch.Tensor) -> torch.Tensor:
    from fivefold.techniques._shared.nf4 import unpacked

    base = layer.get_base_layer()
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    return lean.linear(x, partial(unpacked, base, x.dtype), base.bias, a, b, layer.scaling[NAME])
