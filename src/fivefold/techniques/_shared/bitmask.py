"""Which matrices of a model folder have enough zeros to be stored without them, and doing it, one in memory at a time.

A matrix of N weights with z zeros takes 2 (N - z) + N / 8 bytes without them and 2 N with them in bfloat16, so it
shrinks when z > N / 16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fivefold.model import Model
from fivefold.techniques._shared.modules import stored_tensors, workspace
from fivefold.techniques._shared.packing import Shapes
from fivefold.weights import DTYPE_BYTES, StoredTensor

SAMPLE = 4096


def sparse_layers(model: Model, shapes: Shapes) -> tuple[list[str], float]:
    """The modules that shrink, and the zeros as a share of the weights of all `shapes`."""
    from fivefold.engines._layers.sparse import packed_bytes

    tensors = stored_tensors(model)
    chosen, zeros = [], 0
    for name, (rows, columns) in shapes.items():
        there = int((tensors[f"{name}.weight"].torch().bfloat16() != 0).sum())
        zeros += rows * columns - there
        if packed_bytes(rows, columns, there) < 2 * rows * columns:
            chosen.append(name)
    return chosen, zeros / sum(rows * columns for rows, columns in shapes.values())


def stored_sparsely(model: Model, layers: Sequence[str]) -> Model:
    """A model whose `layers` are stored without their zeros, in a new folder."""
    from fivefold.engines._layers import write_layers
    from fivefold.engines._layers.sparse import pack

    def make(_: str, weight: StoredTensor, __: Mapping[str, Any]) -> dict[str, Any]:
        return pack(weight.torch())

    shapes = {name: stored_tensors(model)[f"{name}.weight"].shape for name in layers}
    settings = {name: {"kind": "sparse", "columns": columns} for name, (_, columns) in shapes.items()}
    return model.but(path=write_layers(model.path, workspace(model, "sparse_storage"), settings, make))


def looks_pruned(model: Model, shapes: Shapes) -> bool:
    """Whether some matrix has enough zeros among its first SAMPLE weights; only those are read."""
    tensors = stored_tensors(model)
    for name in shapes:
        tensor = tensors[f"{name}.weight"]
        size = DTYPE_BYTES[tensor.dtype]
        first = tensor.raw()[: SAMPLE * size].reshape(-1, size)
        if 16 * int((~first.any(1)).sum()) > len(first):
            return True
    return False
