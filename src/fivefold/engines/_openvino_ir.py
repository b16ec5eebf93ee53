"""GGUF -> OpenVINO's own model files, once per file, kept in the cache folder.

The reader of GGUF is inside `openvino_genai`, which compiles a whole pipeline (tokenizer too) before it writes the
model down. So that runs in a process of its own: its memory is not the server's, and a crash there is one sentence
here. The result is filed under the checksum of the GGUF file and the version of the reader.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from fivefold.errors import ModelError
from fivefold.files import atomic_folder, locked, sha256
from fivefold.paths import cache_dir
from fivefold.weights import gguf_header

FAMILIES = ("llama", "qwen2", "qwen3")
MATRIX_TYPES = ("F16", "Q8_0", "Q4_0", "Q4_1")
TIMEOUT_S = 1800


def converted(gguf: Path) -> Path:
    """The .xml file of the converted model. Raises ModelError when OpenVINO cannot read this file."""
    _check(gguf)
    folder = cache_dir() / "openvino" / f"{sha256(gguf)[:24]}-{version('openvino-genai')}"
    with locked(folder.with_suffix(".lock")):
        if not (folder / "openvino_model.xml").is_file():
            with atomic_folder(folder) as work:
                _convert(gguf, work)
    return folder / "openvino_model.xml"


def _check(gguf: Path) -> None:
    header = gguf_header(gguf)
    family = header.metadata.get("general.architecture")
    if family not in FAMILIES:
        raise ModelError(
            f"openvino reads GGUF of the families {', '.join(FAMILIES)}, and {gguf.name} is {str(family)[:40]};"
            " choose another engine"
        )
    bad = sorted({t.type for t in header.tensors if len(t.shape) > 1 and t.type not in MATRIX_TYPES})
    if bad:
        raise ModelError(
            f"openvino reads GGUF matrices of {', '.join(MATRIX_TYPES)}, and {gguf.name} holds {', '.join(bad)};"
            " choose another type or another engine"
        )
    if family == "llama" and any(t.name.endswith("attn_q.bias") for t in header.tensors):
        raise ModelError(
            f"openvino reads a llama with attention biases wrongly (it reorders rows of q and k, not their biases), and"
            f" {gguf.name} has them; choose another engine"
        )
    if "general.file_type" not in header.metadata:
        raise ModelError(f"{gguf.name} has no general.file_type, which openvino needs; export the file again")


def _convert(gguf: Path, work: Path) -> None:
    link = work / "model.gguf"
    os.symlink(gguf.resolve(), link)
    command = [sys.executable, "-m", __name__, str(link)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ModelError(f"openvino did not convert {gguf.name} in {TIMEOUT_S} s; use another engine") from None
    for file in work.iterdir():
        if not file.name.startswith("openvino_model."):
            file.unlink()
    if done.returncode or not (work / "openvino_model.xml").is_file():
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit {done.returncode}"]
        raise ModelError(f"openvino cannot read {gguf.name} ({said[-1][:160]}); use another engine")


if __name__ == "__main__":
    import openvino_genai

    openvino_genai.LLMPipeline(sys.argv[1], "CPU", enable_save_ov_model=True)
