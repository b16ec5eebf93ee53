"""What training changed, as files of their true size: a sparse difference, or an adapter in peft's own format.

A sparse difference lists, per tensor of the model, the flat positions that changed and by how much:

    name.index   int32 (k,), rising; left out where the first k positions changed (a bias, as a whole)
    name.value   float32 (k,)

8 bytes per changed number, 4 in a tensor that changed as a whole. The trained model is *defined* as parent + difference
in float32, so the file gives the model back bit for bit. (In floating point a + (b - a) is not always b, so it would
not if both were rounded from b.) Differences of one parent add up: the sum of several is applied like one, whatever
their order, so a language and a task learned apart can be put on together. A difference is bound to its parent by the
parent's hash, and applied to no other.

It does not pay when most numbers of the model changed: then the trained tensors themselves are the smaller file.

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


Index = NDArray[np.int32] | NDArray[np.int64]
Entry = tuple[Index, NDArray[np.float32]]


def changed(before: NDArray[np.float32], after: NDArray[np.float32]) -> Entry:
    """(flat positions, differences) of two tensors; all positions where listing them would take more room."""
    change = (after - before).reshape(-1)
    index = np.flatnonzero(change)
    if 2 * len(index) > len(change):
        index = np.arange(len(change))
    return _narrow(index), change[index]


def _narrow(index: NDArray[Any]) -> Index:
    return index.astype(np.int64) if len(index) and index[-1] >= 1 << 31 else index.astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Tensor name -> (flat positions, rising; differences); `parent` is the hash of the model they belong to."""

    parent: str
    entries: Mapping[str, Entry]

    @property
    def count(self) -> int:
        """Numbers that differ."""
        return sum(int(np.count_nonzero(value)) for _, value in self.entries.values())

    def save(self, path: Path) -> Path:
        tensors: dict[str, Any] = {}
        for name, (index, value) in self.entries.items():
            tensors[f"{name}.value"] = value.astype(np.float32)
            if len(index) and index[-1] >= len(index):
                tensors[f"{name}.index"] = index
        return write_safetensors(path, tensors, {"parent": self.parent})

    @classmethod
    def load(cls, path: Path) -> Sparse:
        """Raises ModelError when the file is damaged, DataError when it is no sparse difference."""
        from safetensors import safe_open

        stored = check_safetensors(path)
        with safe_open(path, "np") as file:
            parent = (file.metadata() or {}).get("parent", "")
        names = sorted(n.removesuffix(".value") for n in stored if n.endswith(".value"))
        if not parent or {n for n in stored if not n.endswith(".value")} - {f"{n}.index" for n in names}:
            raise DataError(f"{path} is no sparse difference of a model; give the {FILE} of a training run")
        entries: dict[str, Entry] = {}
        for name in names:
            value = stored[f"{name}.value"].numpy()
            index = stored[f"{name}.index"].numpy() if f"{name}.index" in stored else np.arange(value.size)
            if index.shape != value.shape or index.ndim != 1 or index.dtype.kind != "i" or (np.diff(index) <= 0).any():
                raise DataError(f"{path} has positions of {name} that do not fit its values; save it again")
            if value.dtype != np.float32 or not np.isfinite(value).all():
                raise DataError(f"{path} has values of {name} that are not finite numbers; train again")
            entries[name] = (_narrow(index), value)
        return cls(parent=parent, entries=entries)

    def added(self, name: str, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        """The tensor `name` of the parent, in float32, with its difference added."""
        index, value = self.entries[name]
        whole = np.array(tensor, np.float32)
        if len(index) and (index[0] < 0 or index[-1] >= whole.size):
            raise DataError(f"the difference of {name} reaches outside the tensor; save it again")
        whole.reshape(-1)[index] += value
        return whole

    def apply(self, tensors: Mapping[str, Any], parent: str) -> dict[str, Any]:
        """The tensors (numpy or stored) with the difference added. Raises DataError for another parent."""
        if parent != self.parent:
            raise DataError("this difference was learned on another model; apply it to the one it was learned on")
        out = dict(tensors)
        for name in self.entries:
            if name not in out:
                raise DataError(f"the model has no tensor {name}; apply the difference to the one it was learned on")
            given = out[name]
            out[name] = self.added(name, given if isinstance(given, np.ndarray) else given.numpy())
        return out


def compose(parts: Sequence[Sparse]) -> Sparse:
    """The sum of differences of one parent, the same bits in any order. Raises DataError when their parents differ."""
    if len({part.parent for part in parts}) != 1:
        raise DataError("only differences that were learned on one model can be added; give some of the same parent")
    entries: dict[str, Entry] = {}
    for name in sorted({name for part in parts for name in part.entries}):
        found = [part.entries[name] for part in parts if name in part.entries]
        index = np.concatenate([index for index, _ in found])
        value = np.concatenate([value for _, value in found])
        order = np.lexsort((value, index))
        both, first = np.unique(index[order], return_index=True)
        total = np.add.reduceat(value[order].astype(np.float64), first) if len(first) else np.zeros(0)
        entries[name] = (_narrow(both), total.astype(np.float32))
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

    @property
    def dense(self) -> frozenset[str]:
        """Parameters whose change is in no file: they themselves are what one would send."""
        adapter = any(name.endswith(".safetensors") for name in self.files)
        return frozenset() if adapter else frozenset(self.weights) - self.sparse

    def write(self, folder: Path, sparse: Sparse | None) -> int:
        """The bytes of what was written: with `dense`, what one would send to somebody who has the parent."""
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
