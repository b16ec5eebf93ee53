"""A Hugging Face folder: tensors in the type they have, or all floats in bfloat16 where the run plan asks for that.

bfloat16 keeps float32's range with 8 bits of precision (relative rounding error up to 2^-9). Wider than it is stored
nothing is written: a folder of bfloat16 that is computed in float32 stays at 2 bytes per weight. Integer tensors, and
the scales that belong to them, keep their type. An adapter beside the weights is copied as it is.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivefold.errors import NotFinite
from fivefold.files import storage
from fivefold.model import ADAPTER, Model, read_config
from fivefold.weights import (
    DTYPE_BYTES,
    StoredTensor,
    copy_side_files,
    dump_json,
    read_tensors,
    to_bfloat16,
    write_safetensors,
)

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Converted:
    """A stored tensor that is written in another dtype, converted only when its turn comes."""

    source: StoredTensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def raw(self) -> NDArray[np.uint8]:
        values = self.source.numpy()
        if not np.isfinite(values).all():
            raise NotFinite(f"{self.source.name} holds NaN or infinity")
        kind = {"F32": "<f4", "F16": "<f2"}.get(self.dtype)
        out: NDArray[Any] = to_bfloat16(values) if kind is None else values.astype(kind, copy=False)
        return out.reshape(-1).view(np.uint8)


def _otherwise_stored(folder: Path) -> list[str]:
    """Modules listed in layers.json: their tensors belong together in the dtypes they were written in."""
    try:
        return list(json.loads((folder / "layers.json").read_text(encoding="utf-8"))["layers"])
    except FileNotFoundError:
        return []


def _written(tensor: StoredTensor, computed: str) -> str:
    return "BF16" if computed == "bfloat16" else "F32" if tensor.dtype == "F64" else tensor.dtype


def write_folder(model: Model, folder: Path) -> Model:
    """Copy or convert `model.path` into `folder`, one tensor in memory at a time."""
    stored = dict(read_tensors(model.path))
    kept = tuple(f"{module}." for module in _otherwise_stored(model.path))
    tensors = {
        name: Converted(tensor, _written(tensor, model.run.dtype))
        if tensor.dtype in FLOATS and not name.startswith(kept) else tensor
        for name, tensor in stored.items()
    }
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        copy_side_files(model.path, folder)
        if (model.path / ADAPTER).is_dir():
            shutil.copytree(model.path / ADAPTER, folder / ADAPTER, dirs_exist_ok=True)
    config = {k: v for k, v in read_config(model.path).items() if k != "torch_dtype"}
    kinds = Counter(tensor.dtype for tensor in tensors.values())
    half = kinds["BF16"] and not kinds["F32"]
    dump_json(folder / "config.json", {**config, "dtype": "bfloat16" if half else "float32"})
    write_safetensors(folder / "model.safetensors", tensors)
    size = sum(math.prod(t.shape) * DTYPE_BYTES[t.dtype] for t in tensors.values())
    said = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return model.but(path=folder, format="safetensors").covered(f"safetensors: {said}; {size} bytes of weights")
