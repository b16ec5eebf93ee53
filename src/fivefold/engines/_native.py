"""Kernels of our own in C++: compiled once on the user's machine, for its processor, at first use.

A kernel is a file `native/<name>.cpp` with plain C functions over pointers. It includes no header of PyTorch, so it
compiles in about a second and no PyTorch version is bound to it; it is called through ctypes (a microsecond per call)
with `tensor.data_ptr()`. It shares PyTorch's OpenMP runtime where there is one: two runtimes in one process would
keep two sets of threads spinning on the same cores.

The library lies in the cache folder under the hash of source, compiler, flags and processor. It is written under
another name and renamed, so a build that is killed leaves nothing that a later one could wait for.

    CXX=clang++ fivefold ...      names another compiler than c++, g++, clang++ on the path
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from fivefold.errors import UserError
from fivefold.paths import cache_dir

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math",
         "-std=c++17", "-shared", "-fPIC")
"""Not -ffast-math: a library linked with it makes the whole process flush denormal numbers to zero when opened."""
COMPILERS = ("c++", "g++", "clang++")
LIMIT_S = 300


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """The library of `native/<name>.cpp`. Raises UserError when there is no compiler or it fails."""
    source = Path(__file__).parent / "native" / f"{name}.cpp"
    compiler = _compiler(name)
    flags = (*FLAGS, *_openmp())
    what = "\0".join((source.read_text(encoding="utf-8"), compiler, *flags, _processor()))
    library = cache_dir() / "native" / f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if not library.is_file():
        _build(name, [compiler, str(source), *flags], library)
    return ctypes.CDLL(str(library))


def available(name: str) -> str | None:
    """None when `load(name)` will find a compiler, else the sentence why not; builds nothing."""
    try:
        _compiler(name)
    except UserError as error:
        return str(error)
    return None


def _compiler(name: str) -> str:
    wanted = os.environ.get("CXX")
    found = next((path for one in ((wanted,) if wanted else COMPILERS) if (path := shutil.which(one))), None)
    if found is None:
        raise UserError(
            f"the kernel {name!r} is compiled at first use and there is no {wanted or 'C++ compiler'} on the path;"
            " install one (Debian, Ubuntu: apt install g++; macOS: xcode-select --install) or set CXX"
        )
    return found


def _openmp() -> tuple[str, ...]:
    """Flags for PyTorch's own OpenMP runtime when it brings one, else for the compiler's."""
    import torch

    folders = [Path(torch.__file__).parent / "lib", Path(torch.__file__).parent.parent / "torch.libs"]
    for folder in folders:
        for file in sorted(f for name in ("libgomp", "libomp", "libiomp5") for f in folder.glob(f"{name}*")):
            if ".so" in file.name or file.suffix == ".dylib":
                return ("-fopenmp", f"-L{folder}", f"-Wl,-rpath,{folder}", f"-l:{file.name}")
    return ("-fopenmp",)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "") + platform.machine()


def _build(name: str, command: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=library.parent, prefix=f".{name}.", suffix=".so")
    os.close(handle)
    try:
        done = subprocess.run([*command, "-o", partial], capture_output=True, text=True, timeout=LIMIT_S, check=False)
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise UserError(f"{command[0]} could not compile the kernel {name!r} ({said}); set CXX to another compiler")
        os.replace(partial, library)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} took more than {LIMIT_S} s on the kernel {name!r}; try again") from None
    finally:
        Path(partial).unlink(missing_ok=True)
