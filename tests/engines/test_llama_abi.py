from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
from cffi import FFI

from fivefold.engines import _llama_abi as abi
from fivefold.errors import ModelError


@pytest.mark.parametrize(
    ("now", "then"),
    [
        ("n_seq_max, n_rs_seq, n_outputs_max", "n_seq_max, n_outputs_max"),
        ("float defrag_thold;", "float defrag_thold, another;"),
        ("size_t moe_cache_size;", ""),
        ("split_mode, load_mode, lazy_mode", "load_mode, split_mode, lazy_mode"),
        ("bool embeddings, offload_kqv", "bool offload_kqv, embeddings"),
        ("int64_t blck_size, blck_size_interleave;", "int64_t blck_size;"),
    ],
)
def test_another_layout_is_noticed(now: str, then: str) -> None:
    """Declarations that disagree with the library are what a library of another version looks like."""
    assert now in abi.DECLARATIONS
    ffi = FFI()
    ffi.cdef(abi.DECLARATIONS.replace(now, then))
    with pytest.raises(ModelError, match=r"another llama.cpp .* reads .*; run: pip install 'xllamacpp=="):
        abi.check_layout(ffi, ffi.dlopen(str(abi.extension_file())))


def test_the_pin_is_the_installed_one() -> None:
    from importlib.metadata import requires

    assert any(line.startswith(f"xllamacpp=={abi.PINNED}") for line in requires("fivefold") or ())


def test_a_missing_package_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abi, "PACKAGE", "xllamacpp_absent")
    with pytest.raises(ModelError, match="pip install 'xllamacpp=="):
        abi.extension_file()


def test_a_file_without_the_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import _cffi_backend

    monkeypatch.setattr(abi, "extension_file", lambda: abi.Path(_cffi_backend.__file__))
    with pytest.raises(ModelError, match="does not export"):
        abi.library.__wrapped__()


def test_only_errors_are_kept() -> None:
    ffi, lib = abi.library()
    abi.forget_errors()
    assert abi.last_error() == "llama.cpp gave no reason"
    handle = lib.llama_model_load_from_file(b"/nowhere.gguf", lib.llama_model_default_params())
    assert handle == ffi.NULL and "nowhere.gguf" in abi.last_error()


def test_the_compiled_declarations_are_those() -> None:
    file = Path(abi.__file__).with_name("_llama_ffi.py")
    assert file.read_text(encoding="utf-8") == abi.compiled(), "run: python -m fivefold.engines._llama_abi"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages were changed")
def test_a_mapping_is_clean_until_a_page_of_it_is_changed(tmp_path: Path) -> None:
    file = tmp_path / "two words in its name"
    file.write_bytes(b"x" * (4 * mmap.PAGESIZE))
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        assert mapped[0] == ord("x")
        [(first, last)] = abi._clean(str(file))
        assert last - first == len(mapped)
        mapped[mmap.PAGESIZE] = ord("y")
        assert not list(abi._clean(str(file)))
        assert mapped[0] == ord("x") and mapped[mmap.PAGESIZE] == ord("y")


def test_the_version_is_that_of_the_wheel() -> None:
    from importlib.metadata import version

    assert abi.installed() == version("xllamacpp") == abi.PINNED
