"""Checkpoints: the state of a run on disk, whole or absent, and the best state so far.

One safetensors file holds every tensor, with the numbers of the run in its header, so tensors and numbers can never be
of two different moments. It is written beside its place and renamed into it: when the disk fills or the process is
killed, the one before survives. A run is bound to its `key` (data, plan, model): another run's checkpoint is refused.

Without a folder the best state is kept in memory and nothing survives the process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fivefold.errors import StoreError
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
    _best: dict[str, torch.Tensor] = field(default_factory=dict)

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

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """(tensors, numbers) of the last checkpoint, or None. Raises StoreError when it is another run's."""
        if self.folder is None or not (self.folder / STATE).is_file():
            return None
        from safetensors import safe_open

        sweep(self.folder)
        path = self.folder / STATE
        check_safetensors(path)
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            if told.get("key") != self.key:
                raise StoreError(
                    f"{self.folder} holds a run of other data, model or settings; give another --out, or repeat the"
                    " command that began it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = json.loads(told["run"])
        self._saved = float(meta["seconds"])
        return tensors, meta

    def keep_best(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if self.folder is None:
            self._best = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        else:
            write_safetensors(self.folder / BEST, _flat(tensors), {"key": self.key})

    def best(self) -> Mapping[str, torch.Tensor]:
        if self.folder is None:
            return self._best
        from safetensors.torch import load_file

        return dict(load_file(self.folder / BEST))


def _flat(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor if hasattr(tensor, "raw") else tensor.detach().contiguous()
            for name, tensor in tensors.items()}
