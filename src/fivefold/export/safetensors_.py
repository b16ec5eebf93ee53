"""A Hugging Face folder in the dtype the run plan asks for: float32, or bfloat16 at half the bytes.

bfloat16 keeps float32's range with 8 bits of precision (relative rounding error up to 2^-9); it halves what one token
must read from memory. Integer tensors, and the scales that belong to them, keep their type. An adapter beside the
weights is copied as it is.
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
        out: NDArray[Any] = to_bfloat16(values) if self.dtype == "BF16" else values.astype("<f4", copy=False)
        return out.reshape(-1).view(np.uint8)


def _otherwise_stored(folder: Path) -> list[str]:
    """Modules listed in layers.json: their tensors belong together in the dtypes they were written in."""
    try:
        return list(json.loads((folder / "layers.json").read_text(encoding="utf-8"))["layers"])
    except FileNotFoundError:
        return []


def write_folder(model: Model, folder: Path) -> Model:
    """Copy or convert `model.path` into `folder`, one tensor in memory at a time."""
    dtype = {"float32": "F32", "bfloat16": "BF16"}[model.run.dtype]
    stored = dict(read_tensors(model.path))
    kept = tuple(f"{module}." for module in _otherwise_stored(model.path))
    tensors = {
        name: Converted(tensor, dtype) if tensor.dtype in FLOATS and not name.startswith(kept) else tensor
        for name, tensor in stored.items()
    }
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        copy_side_files(model.path, folder)
        if (model.path / ADAPTER).is_dir():
            shutil.copytree(model.path / ADAPTER, folder / ADAPTER, dirs_exist_ok=True)
    config = {k: v for k, v in read_config(model.path).items() if k != "torch_dtype"}
    dump_json(folder / "config.json", {**config, "dtype": model.run.dtype})
    write_safetensors(folder / "model.safetensors", tensors)
    kinds = Counter(tensor.dtype for tensor in tensors.values())
    size = sum(math.prod(t.shape) * DTYPE_BYTES[t.dtype] for t in tensors.values())
    said = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return model.but(path=folder, format="safetensors").covered(f"safetensors: {said}; {size} bytes of weights")
