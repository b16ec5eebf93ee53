"""Calling the kernels of `native/gather.cpp` on torch tensors.

A few rows of activations (decoding, a short draft) are computed by the kernels, each row reading only the weights its
own kept places need: time grows with rows. More than FEW rows (a prompt, a scored text) leave nothing to skip between
them, so the same function is computed densely with the skipped places set to zero; it is then no faster than dense.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fivefold.engines._native import load

FEW = 4
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
STORED = "bf16, gathered"
HALF = {torch.bfloat16: 1, torch.float32: 0}
"""What the kernels read, and the flag that tells them."""


@functools.cache
def kernels() -> Any:
    """The compiled library. Raises UserError where it cannot be compiled."""
    return declared(load("gather"))


def declared(library: Any) -> Any:
    """The library with the types of its arguments."""
    p, n, i, f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    library.gather_linear.argtypes = [p, i, n, n, f, p, n, p, p, i]
    library.gather_ffn.argtypes = [p, i, n, n, n, p, p, i, f, f, p, i, p]
    library.neuron_ffn.argtypes = [p, i, n, n, n, p, p, p, i, f, n, p, p, p, p, i]
    library.gather_linear.restype = library.neuron_ffn.restype = n
    library.gather_ffn.restype = None
    return library


def readable(x: Tensor) -> Tensor:
    """The same values in a dtype and layout the kernels read."""
    return (x if x.dtype in HALF else x.float()).contiguous()


def without(x: Tensor, gone: Tensor) -> Tensor:
    """`x` of shape (..., length, width) with zeros where `gone`, but not in the first row of more than FEW.

    Nearly every later token attends to the first one of a text, and its activations are unlike all others'.
    """
    if x.dim() > 1 and x.shape[-2] > FEW:
        gone[..., 0, :] = False
    return x.masked_fill(gone, 0)


def cut(x: Tensor, threshold: float) -> Tensor:
    """`x` without the values of at most that size."""
    return without(x, x.abs() <= threshold)


def matrix(tensors: Mapping[str, Tensor], name: str, rows: int, columns: int) -> Tensor:
    """A stored bfloat16 matrix of the shape the model describes. Raises ValueError when it is another."""
    found = tensors[name]
    if found.dtype != torch.bfloat16 or tuple(found.shape) != (rows, columns):
        raise ValueError(f"{name} is {tuple(found.shape)} {found.dtype}")
    return found.contiguous()


def number(settings: Mapping[str, Any], name: str) -> float:
    """A finite setting. Raises ValueError."""
    value = float(settings[name])
    if not abs(value) < 1e30:
        raise ValueError(f"{name} is {value}")
    return value
