"""Where the optimiser's state, and what lies beside split weights, is kept between updates.

    Shelf        in memory, where they are computed with
    DiskShelf    in mapped files: an update reads and writes the pages of one parameter, then hands them back to the
                 kernel, which holds them only while memory is free
    HostShelf    in main memory, for weights on an accelerator: copied there for their update, and back

An update sees the same tensors with the same values, so nothing about training changes but its speed. A mapped file has
no name: it is gone with the process, however that ends. Its room is reserved when it is made, so a disk that fills up
is met by a sentence and not in the middle of an update.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fivefold.files import storage
from fivefold.training.precision import State

_MAPPED = "mapped"


class Shelf:
    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, which nobody else holds, where it is to be kept."""
        return tensor

    @contextmanager
    def lend(self, state: State) -> Iterator[State]:
        """What was placed, for reading and writing."""
        yield state

    def stored(self, tensor: torch.Tensor) -> Any:
        """The tensor for `weights.write_safetensors`."""
        return tensor


class DiskShelf(Shelf):
    """Tensors below a page stay in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._madvise = ctypes.CDLL(None, use_errno=True).madvise
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """Raises StoreError when there is no room for it."""
        if tensor.nbytes < mmap.PAGESIZE:
            return tensor
        with storage(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=".offload.", dir=self.folder)
            try:
                os.posix_fallocate(descriptor, 0, tensor.nbytes)
                mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
            finally:
                os.close(descriptor)
                Path(name).unlink()
        mapped = mapped.view(tensor.shape).copy_(tensor)
        setattr(mapped, _MAPPED, True)
        self.put_back(mapped)
        return mapped

    @contextmanager
    def lend(self, state: State) -> Iterator[State]:
        try:
            yield state
        finally:
            for tensor in state.values():
                self.put_back(tensor)

    def put_back(self, tensor: torch.Tensor) -> None:
        """Its pages leave this process; what was written in them is in the file."""
        if hasattr(tensor, _MAPPED) and self._madvise(tensor.data_ptr(), tensor.nbytes, mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")

    def stored(self, tensor: torch.Tensor) -> Any:
        return _Mapped(self, tensor) if hasattr(tensor, _MAPPED) else tensor


@dataclass(frozen=True)
class _Mapped:
    """Read for writing, one at a time."""

    shelf: DiskShelf
    tensor: torch.Tensor

    @property
    def dtype(self) -> str:
        names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int16: "I16", torch.uint8: "U8"}
        return names[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def raw(self) -> Any:
        out = self.tensor.clone().reshape(-1).view(torch.uint8).numpy()
        self.shelf.put_back(self.tensor)
        return out


class HostShelf(Shelf):
    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu()

    @contextmanager
    def lend(self, state: State) -> Iterator[State]:
        there = {name: tensor.to(self.device, copy=True) for name, tensor in state.items()}
        yield there
        for name, tensor in state.items():
            tensor.copy_(there[name])
