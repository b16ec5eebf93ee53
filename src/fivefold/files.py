"""Files that are whole or absent: atomic writing, a lock between processes, checksums.

`os.replace` within one folder is atomic, so a reader sees the old file or the new one, never half of one. The lock
is the operating system's own (`flock`): it ends with the process that held it and so is never left behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fivefold.errors import StoreError

_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO, errno.ENOTDIR}

PARTIAL = ".partial"


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """A full disk, a missing permission and the like become one StoreError; every other error stays what it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        raise StoreError(
            f"{path} cannot be written ({error.strerror}); free space or choose another folder"
        ) from None


def atomic_file(path: Path, fill: Callable[[IO[bytes]], object]) -> Path:
    """Run `fill(binary file)` on a temporary neighbour of `path` and put it in place only when it is complete.

    Raises StoreError when the disk is full or the folder may not be written; nothing half-written remains.
    """
    name = ""
    try:
        with storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = str(path.with_name(f".{path.name}.{os.urandom(8).hex()}{PARTIAL}"))
            descriptor, name = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), draft
            with os.fdopen(descriptor, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
    finally:
        if name:
            Path(name).unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """`atomic_file` for UTF-8 text."""
    return atomic_file(path, lambda file: file.write(text.encode()))


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` to fill; it becomes `path` when the block ends without an error.

    An empty folder at `path` is taken over; one that holds something raises StoreError.
    """
    import shutil
    import tempfile

    if path.is_dir() and any(path.iterdir()):
        raise StoreError(f"{path} is not empty; give a folder that does not exist yet")
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with storage(path):
            yield work
            for file in work.rglob("*"):
                sync(file)
            os.chmod(work, 0o755)
            if path.exists():
                path.rmdir()
            os.replace(work, path)
            sync(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_partial(path: Path) -> None:
    """Remove what a killed process left of `path`. Only for the holder of its lock."""
    import shutil

    for left in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove the half-written files that killed processes left in `folder`. Only for the holder of its lock."""
    for left in folder.glob(f".*{PARTIAL}"):
        left.unlink(missing_ok=True)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Wait for, then hold, the lock file `path`: alone, or together with others that hold it shared."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


@contextmanager
def if_free(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` alone if nobody has it (True); do not wait for it (False)."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        yield free


def sha256(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
