"""Files that are whole or absent: atomic writing, a lock between processes, checksums.

`os.replace` within one folder is atomic, so a reader sees the old file or the new one, never half of one. The lock
is the operating system's own (`flock`): it ends with the process that held it and so is never left behind.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fivefold.errors import StoreError


def refusal(path: Path, error: OSError) -> StoreError:
    """The one sentence for a full disk, a missing permission and the like."""
    return StoreError(f"{path} cannot be written ({error.strerror}); free space or choose another folder")


def atomic_file(path: Path, fill: Callable[[IO[bytes]], object]) -> Path:
    """Run `fill(binary file)` on a temporary neighbour of `path` and put it in place only when it is complete.

    Raises StoreError when the disk is full or the folder may not be written; nothing half-written remains.
    """
    name = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        raise refusal(path, error) from None
    finally:
        if name:
            Path(name).unlink(missing_ok=True)
    return path


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` to fill; it becomes `path` when the block ends without an error.

    An empty folder at `path` is taken over; one that holds something raises StoreError.
    """
    try:
        if path.exists() and any(path.iterdir()):
            raise StoreError(f"{path} is not empty; give a folder that does not exist yet")
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise refusal(path, error) from None
    try:
        yield work
        os.chmod(work, 0o755)
        if path.exists():
            path.rmdir()
        os.replace(work, path)
        _sync(path.parent)
    except OSError as error:
        raise refusal(path, error) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for, then hold, the lock file `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise refusal(path, error) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
