"""Importance of the columns of a matrix: the mean square of what flows into them.

A linear layer computes y = W x. An error E in W costs |E x|^2 on average, which is the sum over rows of E C E^T with
C = mean(x x^T). Its diagonal, mean(x_j^2), says how much an error in column j weighs; a rounding that minimises the
weighted error spends its accuracy where the inputs are large. One forward pass over calibration text collects it for
every linear layer: the memory is the model and one window's activations.

The head reads the final hidden state. A token embedding that is only looked up passes every column on alike: ones.

Source: importance matrix of llama.cpp (ggml-org/llama.cpp, tools/imatrix); Optimal Brain Surgeon for the algebra.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fivefold.artifact import hash_folder, key, source_hash
from fivefold.machine import Machine
from fivefold.model import Model
from fivefold.paths import cache_dir
from fivefold.techniques._shared.calibration import windows
from fivefold.techniques._shared.gguf_types import EMBEDDING, exported_names, matrices
from fivefold.techniques._shared.modules import forward, is_linear, workspace
from fivefold.training.module import load_module, stored_name
from fivefold.weights import write_safetensors

if TYPE_CHECKING:
    import torch

Vectors = dict[str, NDArray[np.float32]]


def importance_file(model: Model, count: int) -> tuple[Path, int]:
    """A safetensors file {exported tensor name: float32 (columns,)} and the number of tokens it was computed from.

    Kept in the cache folder under the hash of weights, tokens and this file's code: all types of one model share it.
    """
    tokens = windows(model, count)
    dtype = fast_dtype()
    parts = {"weights": hash_folder(model.path), "tokens": tokens.tolist(), "dtype": dtype}
    known = key({**parts, "code": source_hash(Squares)})
    file = cache_dir() / "importance" / f"{known}.safetensors"
    if not file.is_file():
        import torch

        write_safetensors(file, importance(model, load_module(model, getattr(torch, dtype)), tokens))
    own = workspace(model, "importance")
    own.mkdir(parents=True)
    return Path(shutil.copy(file, own / "importance.safetensors")), tokens.size


def fast_dtype() -> str:
    """bfloat16 where the processor multiplies it (twice as fast as float32, and a mean square needs no more)."""
    return "bfloat16" if "bf16" in Machine.probe().isa else "float32"


def importance(model: Model, module: Any, tokens: NDArray[np.int64]) -> Vectors:
    """Exported tensor name -> mean square of each input column, shape (columns,), over `tokens` (rows, length)."""
    squares = input_squares(module, tokens)
    names = exported_names(model)
    shapes = matrices(model)
    found = {}
    for name, vector in squares.items():
        if name == "head":
            found[EMBEDDING if model.blueprint.tied else "output.weight"] = vector
        else:
            exported = names[stored_name(module, names, f"{name}.weight")]
            found[exported] = vector
    found.setdefault(EMBEDDING, np.ones(shapes[EMBEDDING][1], np.float32))
    return found


def input_squares(module: Any, tokens: NDArray[np.int64]) -> Vectors:
    """Module name -> mean square of each input column of every linear layer; the head's inputs are under "head"."""
    head = module.get_output_embeddings()
    parts = {n: p for n, p in module.named_modules() if is_linear(p) and p is not head}
    with collecting(parts) as squares:
        for row in tokens:
            squares.add("head", forward(module, row[None]))
    return {name: squares.mean(name).float().numpy() for name in squares.sums}


class Squares:
    """Running sums of squared inputs per column, in float64."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}

    def add(self, name: str, inputs: torch.Tensor) -> None:
        """`inputs` is (..., columns)."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        squares = flat.square().double().sum(0)
        self.sums[name] = self.sums[name] + squares if name in self.sums else squares
        self.rows[name] = self.rows.get(name, 0) + len(flat)

    def mean(self, name: str) -> torch.Tensor:
        """Shape (columns,), float64."""
        return self.sums[name] / self.rows[name]


@contextmanager
def collecting(parts: Mapping[str, Any]) -> Iterator[Squares]:
    """While open, every forward pass through one of `parts` (name -> module) adds its inputs."""
    squares = Squares()
    handles = [
        part.register_forward_pre_hook(lambda _, args, name=name: squares.add(name, args[0]))
        for name, part in parts.items()
    ]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()

