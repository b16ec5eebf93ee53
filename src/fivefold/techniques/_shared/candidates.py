"""What an allocation chooses from: the damage of every matrix in every type it may take; and the rounded bytes.

Damages are predicted from a sample of rows, for rows are rounded independently of each other: half of the sample are
the rows whose errors count most, the other half stand for all the rest. Only what is then chosen is rounded whole.

None of this depends on the budget, so curvatures, damages and every matrix rounded so far are kept in the cache under
the sum of the weights and of the calibration tokens: another budget for the same model rounds only what the ones
before it did not. The curvatures take columns^2 numbers a matrix, about as much as the model; the KEPT newest models
are held.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fivefold.artifact import source_hash
from fivefold.files import atomic_file, atomic_folder, locked, remove_partial, sha256, sweep, write_text
from fivefold.model import Model
from fivefold.paths import cache_dir
from fivefold.techniques._shared.calibration import windows as calibration_windows
from fivefold.techniques._shared.sensitivity import Curvature, curvatures, load_curvature, save_curvatures

KEPT = 2
LEAST_ROWS, ROW_SHARE, MOST_ROWS = 96, 8, 2048
"""A sample has every ROW_SHARE-th row, but no fewer than LEAST_ROWS and no more than MOST_ROWS."""
Packed = NDArray[np.uint8]
Rounding = Literal["both", "feedback", "nearest"]


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Packed bytes (rows, row bytes) by exported name, the KL in nats per token predicted for all together, and how
    they came about."""

    packed: Mapping[str, Packed]
    predicted: float
    note: str


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """`damage[name][type]` is the predicted KL in nats per token."""

    folder: Path
    model: Model
    damage: Mapping[str, Mapping[str, float]]
    tokens: int
    rounding: Rounding
    note: str

    def round(self, chosen: Mapping[str, str]) -> Rounded:
        """Round every matrix to its chosen type, or take it from the cache."""
        from fivefold.export.gguf_ import exported_tensors

        start = time.perf_counter()
        with locked(self.folder.parent / "lock"):
            sweep(self.folder / "rounded")
            missing = {n: k for n, k in chosen.items() if not self._file(n, k).is_file()}
            tensors = exported_tensors(self.model.path)
            work = [(n, k, tensors[n]) for n, k in missing.items()]
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool, OneThreadEach():
                list(pool.map(lambda item: self._round(*item), work))
            found = {name: dict(np.load(self._file(name, kind), allow_pickle=False)) for name, kind in chosen.items()}
        seconds = time.perf_counter() - start
        return Rounded(
            packed={name: one["data"] for name, one in found.items()},
            predicted=sum(float(one["damage"]) for one in found.values()),
            note=f"{len(missing)} of {len(chosen)} matrices rounded anew in {seconds:.0f} s{self.note}",
        )

    def _file(self, name: str, kind: str) -> Path:
        return self.folder / "rounded" / f"{name}.{kind}.npz"

    def _round(self, name: str, kind: str, tensor: Any) -> None:
        matrix, curvature = tensor.numpy(), load_curvature(self.folder, name).shrunk(self.tokens)
        data = rounded(matrix, kind, curvature, self.rounding)
        damage = curvature.damage(_error(matrix, data, kind))
        atomic_file(self._file(name, kind), lambda out: np.savez(out, data=data, damage=damage))


def prepare(
    model: Model, types: Mapping[str, tuple[str, ...]], *, windows: int, length: int, rounding: Rounding
) -> Candidates:
    """Judge all of `types` (exported name -> types), or take the same work from the cache."""
    from fivefold.engines._quantize import quantize
    from fivefold.techniques._shared.feedback import round_with_feedback
    from fivefold.techniques._shared.two_sided import round_both_ways

    tokens = calibration_windows(model, windows, length)
    shape = (model.blueprint.heads, model.blueprint.kv_heads)
    code = [source_hash(part) for part in (prepare, curvatures, round_with_feedback, round_both_ways, quantize)]
    asked = json.dumps([code, sorted(types.items()), rounding, shape])
    parts = [asked.encode(), tokens.tobytes(), *(sha256(f).encode() for f in sorted(model.path.glob("*.safetensors")))]
    folder = cache_dir() / "candidates" / hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    start = time.perf_counter()
    with locked(folder.parent / "lock"):
        if (folder / "damage.json").is_file():
            took = float((folder / "seconds.txt").read_text())
            note = f"; damages known earlier from {tokens.size} calibration tokens, in {took:.0f} s not counted here"
            os.utime(folder)
        else:
            remove_partial(folder)
            with atomic_folder(folder) as work:
                _judge(work, model, types, tokens, rounding)
                write_text(work / "seconds.txt", f"{time.perf_counter() - start:.1f}")
            _forget(folder.parent)
            note = f"; damages predicted anew from {tokens.size} calibration tokens"
    damage = json.loads((folder / "damage.json").read_text())
    return Candidates(folder=folder, model=model, damage=damage, tokens=tokens.size, rounding=rounding, note=note)


def _judge(
    work: Path, model: Model, types: Mapping[str, tuple[str, ...]], tokens: NDArray[np.int64], rounding: Rounding
) -> None:
    import torch

    from fivefold.export.gguf_ import exported_tensors
    from fivefold.training.module import load_module

    module = load_module(model, torch.float32)
    save_curvatures(work, curvatures(model, module, tokens, outputs=rounding == "both"))
    del module
    tensors = exported_tensors(model.path)

    def judge(name: str) -> dict[str, float]:
        curvature = load_curvature(work, name).shrunk(tokens.size)
        return sampled_damage(tensors[name].numpy(), types[name], curvature, rounding)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool, OneThreadEach():
        damage = dict(zip(types, pool.map(judge, types), strict=True))
    write_text(work / "damage.json", json.dumps(damage))


def sampled_damage(
    matrix: NDArray[np.float32], kinds: tuple[str, ...], curvature: Curvature, rounding: Rounding
) -> dict[str, float]:
    """Type -> predicted KL of the whole matrix, from a sample of its rows.

    The sample is rounded row by row; what feedback over rows will still gain is foretold by its factor.
    """
    rows, share = sample(curvature.row_weights(matrix))
    part, apart = np.ascontiguousarray(matrix[rows]), replace(curvature, outputs=None)
    gain, found = _gain(curvature), {}
    for kind in kinds:
        error = _error(part, rounded(part, kind, apart, rounding, sweeps=0), kind)
        found[kind] = gain * float(share @ apart.row_damage(error, rows))
    return found


def _gain(curvature: Curvature) -> float:
    """The mean weight of a row when those after it make up for its errors, as a share of its weight alone."""
    from fivefold.techniques._shared.feedback import factor

    if curvature.outputs is None:
        return 1.0
    return float(factor(curvature.outputs).diagonal().double().pow(-2).mean())


def sample(weights: NDArray[np.float64]) -> tuple[NDArray[np.int64], Any]:
    """Rows to look at, and how many rows each stands for (a torch vector). The heaviest stand for themselves."""
    import torch

    count = min(len(weights), MOST_ROWS, max(LEAST_ROWS, len(weights) // ROW_SHARE))
    order = np.argsort(-weights, kind="stable")
    top, rest = order[: count // 2], order[count // 2 :]
    drawn = np.random.default_rng(0).choice(rest, count - len(top), replace=False)
    share = torch.ones(count)
    share[len(top) :] = len(rest) / max(1, len(drawn))
    return np.concatenate([top, drawn]), share


def rounded(
    matrix: NDArray[np.float32], kind: str, curvature: Curvature, rounding: Rounding, *, sweeps: int | None = None
) -> Packed:
    """The matrix in type `kind`; "nearest" rounds each block alone, weighed by H's diagonal."""
    from fivefold.engines._quantize import quantize
    from fivefold.techniques._shared import feedback, two_sided

    hessian = curvature.hessian()
    if rounding == "nearest" or kind == "f16":
        return quantize(matrix, kind, feedback.importance(hessian), threads=1)
    if rounding == "feedback":
        count = feedback.SWEEPS if sweeps is None else sweeps
        return feedback.round_with_feedback(matrix, kind, hessian, curvature.upper, sweeps=count)
    count = two_sided.SWEEPS if sweeps is None else sweeps
    return two_sided.round_both_ways(matrix, kind, hessian, curvature.upper, curvature.outputs, sweeps=count)


def _error(matrix: NDArray[np.float32], data: Packed, kind: str) -> Any:
    import torch

    from fivefold.engines._quantize import dequantize

    rows, columns = matrix.shape
    return torch.from_numpy(dequantize(data, kind, (rows, columns)) - matrix)


class OneThreadEach:
    """Within: torch works with one thread, for the matrices are spread over threads instead."""

    def __enter__(self) -> None:
        import torch

        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        import torch

        torch.set_num_threads(self.threads)


def _forget(folder: Path) -> None:
    entries = sorted((f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")),
                     key=lambda f: f.stat().st_mtime)
    for old in entries[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
