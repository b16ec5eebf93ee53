"""Every matrix rounded to every type it may take, with the damage predicted for each: what an allocation chooses from.

The work does not depend on the budget, so it is kept in the cache under the sum of the weights and of the calibration
tokens: another budget for the same model costs seconds. Only the KEPT newest are held, one byte or less per weight and
type each.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fivefold.artifact import source_hash
from fivefold.files import atomic_folder, locked, sha256, write_text
from fivefold.model import Model
from fivefold.paths import cache_dir
from fivefold.techniques._shared.calibration import windows as calibration_windows
from fivefold.weights import check_safetensors, write_safetensors

KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """`damage[name][type]` is the predicted KL in nats per token; `packed` the bytes, (rows, row bytes)."""

    folder: Path
    damage: Mapping[str, Mapping[str, float]]
    note: str

    def packed(self, name: str, kind: str) -> NDArray[np.uint8]:
        return np.array(check_safetensors(self.folder / f"{kind}.safetensors")[name].numpy())


def prepare(
    model: Model, types: Mapping[str, tuple[str, ...]], *, windows: int, length: int, feedback: bool, damp: float
) -> Candidates:
    """Round and judge all of `types` (exported name -> types), or take the same work from the cache."""
    from fivefold.engines._quantize import quantize
    from fivefold.techniques._shared.block_feedback import round_with_feedback
    from fivefold.techniques._shared.sensitivity import curvatures

    tokens = calibration_windows(model, windows, length)
    shape = (model.blueprint.heads, model.blueprint.kv_heads)
    code = [source_hash(part) for part in (prepare, curvatures, round_with_feedback, quantize)]
    asked = json.dumps([code, sorted(types.items()), feedback, damp, shape])
    parts = [asked.encode(), tokens.tobytes(), *(sha256(f).encode() for f in sorted(model.path.glob("*.safetensors")))]
    folder = cache_dir() / "candidates" / hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    start = time.perf_counter()
    with locked(folder.parent / "lock"):
        if (folder / "damage.json").is_file():
            took = float((folder / "seconds.txt").read_text())
            note = f"; rounded earlier from {tokens.size} calibration tokens, in {took:.0f} s not counted here"
            os.utime(folder)
        else:
            with atomic_folder(folder) as work:
                _fill(work, model, types, tokens, feedback, damp)
                write_text(work / "seconds.txt", f"{time.perf_counter() - start:.1f}")
            _forget(folder.parent)
            note = f"; rounded anew from {tokens.size} calibration tokens"
    return Candidates(folder=folder, damage=json.loads((folder / "damage.json").read_text()), note=note)


def _fill(
    work: Path, model: Model, types: Mapping[str, tuple[str, ...]], tokens: NDArray[np.int64], feedback: bool,
    damp: float,
) -> None:
    import torch

    from fivefold.engines._quantize import dequantize, quantize
    from fivefold.export.gguf_ import exported_tensors
    from fivefold.techniques._shared.block_feedback import factor, importance, round_with_feedback
    from fivefold.techniques._shared.modules import load_module
    from fivefold.techniques._shared.sensitivity import curvatures

    module = load_module(model, torch.float32)
    known = curvatures(model, module, tokens)
    del module
    tensors = exported_tensors(model.path)
    damage: dict[str, dict[str, float]] = {}
    packed: dict[str, dict[str, NDArray[np.uint8]]] = {}
    for name, kinds in types.items():
        matrix, curvature = tensors[name].numpy(), known.pop(name)
        hessian = curvature.hessian()
        upper = factor(hessian, damp) if feedback else None
        damage[name] = {}
        for kind in kinds:
            if upper is None or kind == "f16":
                data = quantize(matrix, kind, importance(hessian))
            else:
                data = round_with_feedback(matrix, kind, hessian, upper)
            error = torch.from_numpy(dequantize(data, kind, matrix.shape) - matrix)
            damage[name][kind] = curvature.damage(error)
            packed.setdefault(kind, {})[name] = data
    for kind, found in packed.items():
        write_safetensors(work / f"{kind}.safetensors", found)
    (work / "damage.json").write_text(json.dumps(damage), encoding="utf-8")


def _forget(folder: Path) -> None:
    entries = sorted((f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")),
                     key=lambda f: f.stat().st_mtime)
    for old in entries[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
