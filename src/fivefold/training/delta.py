"""What training changed, as files of their true size: a sparse difference, or an adapter in peft's own format.

A sparse difference lists, per tensor of the model, the flat positions that changed and by how much:

    name.index   int32 (k,), rising          name.value   float32 (k,)

8 bytes per changed number. Differences of one parent add up: the sum of two is applied like one, so a language and a
task learned apart can be put on together. A difference is bound to its parent by the parent's hash, and applied to no
other.

It does not pay when most numbers changed: from half of them on, the whole tensor in float32 is smaller.

Source: Ansell et al., arXiv 2110.07560 (composing sparse fine-tunings).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivefold.errors import DataError
from fivefold.weights import check_safetensors, write_safetensors

FILE = "delta.safetensors"


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Tensor name -> (flat positions int32, differences float32); `parent` is the hash of the model they belong to."""

    parent: str
    entries: Mapping[str, tuple[NDArray[np.int32], NDArray[np.float32]]]

    @property
    def count(self) -> int:
        return sum(len(index) for index, _ in self.entries.values())

    def save(self, path: Path) -> Path:
        tensors: dict[str, Any] = {}
        for name, (index, value) in self.entries.items():
            tensors[f"{name}.index"], tensors[f"{name}.value"] = index.astype(np.int32), value.astype(np.float32)
        return write_safetensors(path, tensors, {"parent": self.parent})

    @classmethod
    def load(cls, path: Path) -> Sparse:
        """Raises ModelError when the file is damaged, DataError when it is no sparse difference."""
        from safetensors import safe_open

        stored = check_safetensors(path)
        with safe_open(path, "np") as file:
            parent = (file.metadata() or {}).get("parent", "")
        entries = {}
        for name in sorted({n.removesuffix(".index") for n in stored if n.endswith(".index")}):
            if f"{name}.value" not in stored:
                raise DataError(f"{path} lacks the values of {name}; save the difference again")
            index, value = stored[f"{name}.index"].numpy(), stored[f"{name}.value"].numpy()
            if index.shape != value.shape or index.ndim != 1 or (len(index) and (np.diff(index) <= 0).any()):
                raise DataError(f"{path} has positions of {name} that do not fit its values; save it again")
            entries[name] = (index.astype(np.int32), value.astype(np.float32))
        if not parent or 2 * len(entries) != len(stored):
            raise DataError(f"{path} is no sparse difference of a model; give the delta.safetensors of a training run")
        return cls(parent=parent, entries=entries)

    def apply(self, tensors: Mapping[str, Any], parent: str) -> dict[str, Any]:
        """The tensors (numpy or stored) with the difference added. Raises DataError for another parent."""
        if parent != self.parent:
            raise DataError("this difference was learned on another model; apply it to the one it was learned on")
        out = dict(tensors)
        for name, (index, value) in self.entries.items():
            if name not in out:
                raise DataError(f"the model has no tensor {name}; apply the difference to the one it was learned on")
            given = out[name]
            whole = np.array(given if isinstance(given, np.ndarray) else given.numpy(), np.float32)
            if len(index) and (index[0] < 0 or index[-1] >= whole.size):
                raise DataError(f"the difference of {name} reaches outside the tensor; save it again")
            whole.reshape(-1)[index] += value
            out[name] = whole
        return out


def compose(parts: Sequence[Sparse]) -> Sparse:
    """The sum of differences of one parent. Raises DataError when their parents differ."""
    if len({part.parent for part in parts}) != 1:
        raise DataError("the differences were learned on different models and cannot be added; train them on one")
    entries: dict[str, tuple[NDArray[np.int32], NDArray[np.float32]]] = {}
    for part in parts:
        for name, (index, value) in part.entries.items():
            old = entries.get(name, (np.empty(0, np.int32), np.empty(0, np.float32)))
            both = np.union1d(old[0], index).astype(np.int32)
            total = np.zeros(len(both), np.float32)
            total[np.searchsorted(both, old[0])] += old[1]
            total[np.searchsorted(both, index)] += value
            entries[name] = (both, total)
    return Sparse(parent=parts[0].parent, entries=entries)


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What an adaptation hands back. `weights`: module parameter name -> a call that gives its merged float32 value.

    `sparse` names parameters of which only some numbers changed: saved as a difference. `files` maps a file name to
    tensors or to JSON, written as they are (an adapter). `beside` True: the adapter is not merged and must be served
    with the model.
    """

    weights: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    sparse: frozenset[str] = frozenset()
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    beside: bool = False

    def write(self, folder: Path, sparse: Sparse | None) -> int:
        """The bytes of what was written: what one would send to somebody who has the parent."""
        folder.mkdir(parents=True, exist_ok=True)
        if sparse is not None:
            sparse.save(folder / FILE)
        for name, content in self.files.items():
            if name.endswith(".json"):
                from fivefold.files import write_text

                write_text(folder / name, json.dumps(content, indent=1, sort_keys=True) + "\n")
            else:
                write_safetensors(folder / name, content)
        return sum(f.stat().st_size for f in folder.iterdir())
