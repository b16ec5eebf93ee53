"""Checkpoints: the state of a run on disk, whole or absent, and the best state so far.

One safetensors file holds every tensor, with the numbers of the run in its header, so tensors and numbers can never be
of two different moments. It is written beside its place and renamed into it: when the disk fills or the process is
killed, the one before survives. A run is bound to its `key` (data, plan, model): another run's checkpoint is refused.

Without a folder the best state is kept in memory and nothing survives the process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fivefold.errors import ModelError, StoreError
from fivefold.files import sweep
from fivefold.weights import check_safetensors, write_safetensors

SECONDS = 30.0
"""Between two checkpoints; with the time to write one, a killed process loses less than a minute."""
STATE, BEST = "checkpoint.safetensors", "best.safetensors"


@dataclass(eq=False)
class Keeper:
    folder: Path | None = None
    key: str = ""
    every: float = SECONDS
    _saved: float = 0.0
    _best: tuple[dict[str, torch.Tensor], tuple[int, float]] = ({}, (0, 0.0))

    @property
    def lasting(self) -> bool:
        return self.folder is not None

    def due(self, seconds: float) -> bool:
        return self.lasting and seconds - self._saved >= self.every

    def save(self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], seconds: float) -> None:
        """Raises StoreError when the disk is full; the checkpoint before is still there."""
        assert self.folder is not None
        self._saved = seconds
        write_safetensors(self.folder / STATE, _flat(tensors), {"key": self.key, "run": json.dumps(dict(meta))})

    def meta(self) -> dict[str, Any] | None:
        """The numbers of the last checkpoint, or None. Raises StoreError when it is another run's, or damaged."""
        if self.folder is None:
            return None
        sweep(self.folder)
        if not (self.folder / STATE).is_file():
            return None
        from safetensors import safe_open

        with _whole(self.folder / STATE), safe_open(self.folder / STATE, "pt") as file:
            told = file.metadata() or {}
        if told.get("key") != self.key:
            raise StoreError(
                f"{self.folder} holds a run of other data, model or settings; give another --out, or repeat the"
                " command that began it"
            )
        out: dict[str, Any] = json.loads(told["run"])
        return out

    def load(self) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]] | None:
        """(tensors, numbers) of the last checkpoint, or None. Raises StoreError as `meta` does."""
        meta = self.meta()
        if meta is None:
            return None
        assert self.folder is not None
        self._saved = float(meta["seconds"])
        with _whole(self.folder / BEST), _whole(self.folder / STATE):
            return _Stored(self.folder / STATE), meta

    def keep_best(self, tensors: Mapping[str, torch.Tensor], step: int, score: float) -> None:
        if self.folder is None:
            self._best = {name: tensor.detach().clone() for name, tensor in tensors.items()}, (step, score)
        else:
            told = {"key": self.key, "step": str(step), "score": repr(score)}
            write_safetensors(self.folder / BEST, _flat(tensors), told)

    def best(self) -> tuple[Mapping[str, torch.Tensor], tuple[int, float]]:
        """The best state, its step and score: of a killed process's, when it got further than its last checkpoint."""
        if self.folder is None:
            return self._best
        stored = _Stored(self.folder / BEST)
        return stored, (int(stored.told["step"]), float(stored.told["score"]))


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        check_safetensors(path)
        yield
    except (ModelError, OSError, SafetensorError) as error:
        why, first = str(error).partition(";")[0], path.with_name(STATE)
        raise StoreError(f"{path} is missing or damaged ({why}); remove {first} to train again") from None


class _Stored(Mapping[str, torch.Tensor]):
    """The tensors of a file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.names, self._open = check_safetensors(path), lambda: safe_open(path, "pt")
        with self._open() as file:
            self.told = file.metadata() or {}

    def __getitem__(self, name: str) -> torch.Tensor:
        with self._open() as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _flat(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor if hasattr(tensor, "raw") else tensor.detach().contiguous()
            for name, tensor in tensors.items()}
