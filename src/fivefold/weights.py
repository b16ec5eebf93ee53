"""Weights on disk: safetensors and GGUF, read without trusting them and written in one step.

Both formats are a header followed by raw numbers. A header is an untrusted promise about the file: before anything
is allocated, every promised size is compared with the bytes that are really there, so a truncated, corrupted or
hostile file costs one sentence (`ModelError`) and no memory.

    safetensors   u64 length of a JSON header; {name: {dtype, shape, data_offsets}}; tensors without gaps to the end
    GGUF v3       magic, counts, typed key-values, {name, dims (fastest first), type, offset}; aligned tensors

A tensor is read when `numpy()` or `torch()` is called, from a memory map: a folder of any size can be streamed one
tensor at a time. bfloat16 is the upper half of a float32, so reading it is a shift and writing it a rounding to the
nearest even. This module imports no torch.

Sources: the safetensors format (huggingface/safetensors, README), the GGUF specification (ggml, docs/gguf.md).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fivefold.errors import ModelError
from fivefold.files import atomic_file, atomic_folder, write_text
from fivefold.model import Blueprint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_JSON_HEADER = 4 << 20
MAX_JSON_BRACKETS = 1 << 19
MAX_ENTRIES = 1 << 16
MAX_TEXT = 16 << 20
MAX_STRINGS = 1 << 22
MAX_ARRAY_BYTES = 256 << 20
MAX_ELEMENTS = 1 << 40

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}
NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "U64": "<u8", "I32": "<i4", "U32": "<u4",
    "I16": "<i2", "U16": "<u2", "I8": "i1", "U8": "u1", "BOOL": "?",
}
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "layers.json",
)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor in a safetensors file, not yet read. `dtype` is the file's spelling: F32, BF16, ..."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def raw(self) -> NDArray[np.uint8]:
        """The bytes, mapped and read-only, shape (nbytes,)."""
        import numpy as np

        if not self.nbytes:
            return np.empty(0, np.uint8)
        return np.memmap(self.file, np.uint8, "r", self.offset, (self.nbytes,))

    def numpy(self) -> NDArray[Any]:
        """Floating types as float32 (float64 too), the others in their own type; a copy, shape `shape`."""
        import numpy as np

        if self.dtype == "BF16":
            halves = self.raw().view("<u2").astype(np.uint32) << np.uint32(16)
            return halves.view(np.float32).reshape(self.shape)
        if self.dtype not in NUMPY:
            raise ModelError(f"{self.name} in {self.file} is stored as {self.dtype}; convert it to F32")
        values = self.raw().view(NUMPY[self.dtype]).reshape(self.shape)
        return values.astype(np.float32 if values.dtype.kind == "f" else values.dtype)

    def torch(self) -> Any:
        """The tensor in the file's own dtype."""
        from safetensors import safe_open

        with safe_open(self.file, "pt") as handle:
            return handle.get_tensor(self.name)


def check_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors a safetensors file holds, after checking every promise in its header.

    Raises ModelError when the file is truncated, corrupted or promises an absurd shape.
    """
    header, start, size = _safetensors_header(path)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name] = _entry(path, name, entry, start, size)
    if not tensors:
        raise ModelError(f"{path} holds no tensors; copy the model again")
    position = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != position:
            raise ModelError(f"{path} is corrupted: {tensor.name} overlaps or leaves a gap; copy it again")
        position += tensor.nbytes
    if position != size:
        raise ModelError(f"{path} is corrupted: {size - position} bytes at its end belong to no tensor; copy it again")
    return tensors


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int, int]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if length < 2 or length > size - 8:
                raise ModelError(f"{path} is truncated or no safetensors file ({size} bytes); copy the model again")
            if length > MAX_JSON_HEADER:
                raise ModelError(f"{path} has a header of {length} bytes, more than any model needs; copy it again")
            text = file.read(length)
            if text.count(b"[") + text.count(b"{") > MAX_JSON_BRACKETS:
                raise ModelError(f"{path} has a header with more entries than any model needs; copy it again")
            header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is corrupted: its header is not the expected JSON; copy it again") from None
    if not isinstance(header, dict) or len(header) > MAX_ENTRIES:
        raise ModelError(f"{path} is corrupted: its header is not a table of tensors; copy it again")
    return header, 8 + length, size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key appears twice")
    return out


def _entry(path: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    def whole(values: Any, longest: int) -> bool:
        return isinstance(values, list) and len(values) <= longest and all(
            type(v) is int and 0 <= v <= MAX_ELEMENTS for v in values
        )

    table = entry if isinstance(entry, dict) else {}
    dtype, shape, span = table.get("dtype"), table.get("shape"), table.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES or not whole(shape, 8) or not whole(span, 2):
        raise ModelError(f"{path} is corrupted: the header entry of {name[:80]!r} makes no sense; copy it again")
    assert isinstance(shape, list) and isinstance(span, list)
    elements = math.prod(shape)
    if elements > MAX_ELEMENTS:
        raise ModelError(f"{path} is corrupted: {name[:80]!r} claims the absurd shape {shape}; copy it again")
    if len(span) != 2 or span[1] - span[0] != elements * DTYPE_BYTES[dtype]:
        raise ModelError(
            f"{path} is corrupted: {name[:80]!r} has shape {shape} of {dtype} but bytes {span}; copy it again"
        )
    if start + span[1] > size:
        missing = start + span[1] - size
        raise ModelError(f"{path} is truncated: {name[:80]!r} ends {missing} bytes after the file; copy it again")
    return StoredTensor(
        name=name, file=path, dtype=dtype, shape=tuple(shape), offset=start + span[0], nbytes=span[1] - span[0]
    )


def read_tensors(folder: Path) -> Iterator[tuple[str, StoredTensor]]:
    """(name, tensor) for every tensor of a Hugging Face folder, in name order over all its shards; nothing is read."""
    found: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in check_safetensors(file).items():
            if name in found:
                raise ModelError(f"{folder} holds {name} in two files; remove the shard that does not belong to it")
            found[name] = tensor
    if not found:
        raise ModelError(f"{folder} holds no safetensors weights; give a folder saved with safe_serialization=True")
    yield from sorted(found.items())


def to_bfloat16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """The upper halves of float32 values, rounded to the nearest even; NaN stays NaN."""
    import numpy as np

    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(bits.view(np.float32)), quiet, rounded).astype(np.uint16)


def write_safetensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> Path:
    """Write name -> tensor atomically, one tensor in memory at a time.

    A tensor is a numpy array, a torch tensor, or anything like StoredTensor: `dtype`, `shape` and `raw()` -> bytes.
    """
    names = sorted(tensors, key=lambda n: (-DTYPE_BYTES[_spec(tensors[n])[0]], n))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name in names:
        dtype, shape = _spec(tensors[name])
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def fill(file: Any) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(_bytes(tensors[name]).data)

    return atomic_file(path, fill)


def write_safetensors_folder(
    folder: Path,
    tensors: Mapping[str, Any],
    *,
    like: Path | None = None,
    config: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """A new Hugging Face folder: weights, `config`, `texts` (file name -> content), and the small files of `like`.

    `folder` must not exist yet (an empty one is taken over): it appears complete or not at all.
    """
    with atomic_folder(folder) as work:
        if like is not None:
            copy_side_files(like, work)
        if config is not None:
            dump_json(work / "config.json", config)
        for name, text in (texts or {}).items():
            (work / name).write_text(text, encoding="utf-8")
        write_safetensors(work / "model.safetensors", tensors)
    return folder


def copy_side_files(source: Path, target: Path, names: Sequence[str] = SIDE_FILES) -> None:
    """Copy config, tokenizer, chat template and the like: small files only, never weights."""
    import shutil

    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def dump_json(path: Path, value: Mapping[str, Any]) -> Path:
    """Indented UTF-8 JSON, written atomically."""
    return write_text(path, json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n")


def write_solved(folder: Path, tensors: Mapping[str, tuple[str, NDArray[np.uint8]]]) -> Path:
    """Already packed tensors for `ExportPlan.solved`: exported name -> (storage type, bytes)."""
    types = {name: kind.upper() for name, (kind, _) in tensors.items()}
    return write_safetensors(folder / "solved.safetensors", {n: data for n, (_, data) in tensors.items()}, types).parent


def read_solved(folder: Path) -> dict[str, tuple[str, StoredTensor]]:
    """What `write_solved` wrote: exported name -> (storage type, tensor of uint8)."""
    file = folder / "solved.safetensors"
    tensors = check_safetensors(file)
    types = _safetensors_header(file)[0].get("__metadata__", {})
    return {name: (str(types.get(name)), tensor) for name, tensor in tensors.items()}


def _spec(value: Any) -> tuple[str, tuple[int, ...]]:
    if hasattr(value, "raw"):
        return value.dtype, value.shape
    shape = tuple(int(n) for n in value.shape)
    name = str(value.dtype).removeprefix("torch.")
    short = {"bfloat16": "BF16", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    kinds = {"float": "F", "uint": "U", "int": "I"}
    kind = name.rstrip("0123456789")
    dtype = short.get(name) or kinds.get(kind, "?") + name[len(kind):]
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"a tensor of type {name} cannot be stored as safetensors; convert it to float32")
    return dtype, shape


def _bytes(value: Any) -> NDArray[np.uint8]:
    import numpy as np

    if hasattr(value, "raw"):
        raw: NDArray[np.uint8] = value.raw()
        return raw
    if not isinstance(value, np.ndarray):
        import torch

        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    flat = np.ascontiguousarray(value).reshape(-1)
    return flat.view(np.uint8) if flat.size else np.empty(0, np.uint8)


@dataclass(frozen=True, kw_only=True, slots=True)
class GGUFArray:
    """An array of the header, left in the file until `read()`."""

    file: Path
    kind: str
    count: int
    offset: int
    nbytes: int

    def __len__(self) -> int:
        return self.count

    def read(self) -> list[Any]:
        if self.nbytes > MAX_ARRAY_BYTES:
            raise ModelError(f"{self.file} holds an array of {self.nbytes} bytes in its header; copy it again")
        with self.file.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.nbytes)
        if self.kind != "string":
            return [value for (value,) in struct.iter_unpack(_SCALARS[self.kind], data)]
        out, at = [], 0
        for _ in range(self.count):
            (length,) = struct.unpack_from("<Q", data, at)
            out.append(data[at + 8 : at + 8 + length].decode("utf-8", "replace"))
            at += 8 + length
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class GGUFTensor:
    """`shape` is (rows, columns) as in numpy, the reverse of the file's order; `offset` is from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class GGUFHeader:
    file: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GGUFTensor, ...]

    def blueprint(self) -> Blueprint:
        """Raises ModelError when a key is missing or absurd. Layers that differ count with their largest value."""
        family = self.metadata.get("general.architecture")
        if not isinstance(family, str):
            raise ModelError(f"{self.file} does not say its architecture; give a GGUF file of a language model")

        def number(key: str, default: int | None = None) -> int:
            value = self.metadata.get(f"{family}.{key}", default)
            if isinstance(value, GGUFArray) and value.kind != "string" and value.count <= 4096:
                value = max(value.read(), default=None)
            if type(value) is not int or value < 1:
                raise ModelError(f"{self.file} says {family}.{key} = {str(value)[:40]}; give a complete GGUF file")
            return value

        shapes = {t.name: t.shape for t in self.tensors}
        width, heads = number("embedding_length"), number("attention.head_count")
        vocab = number("vocab_size", shapes.get("token_embd.weight", (0,))[0])
        return Blueprint(
            family=family, layers=number("block_count"), width=width, heads=heads,
            kv_heads=number("attention.head_count_kv", heads), ffn=number("feed_forward_length"),
            head_dim=number("attention.key_length", width // heads), context=number("context_length", 2048),
            vocab=vocab, tied="output.weight" not in shapes, gated="blk.0.ffn_gate.weight" in shapes,
        )


_SCALARS = {
    "uint8": "<B", "int8": "<b", "uint16": "<H", "int16": "<h", "uint32": "<I", "int32": "<i", "float32": "<f",
    "bool": "<?", "uint64": "<Q", "int64": "<q", "float64": "<d",
}
_KINDS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array", "uint64",
          "int64", "float64")


GGML_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}
"""ggml's number of a storage type: (name, weights in a block, bytes of a block)."""


def gguf_header(path: Path) -> GGUFHeader:
    """Metadata and tensor table of a GGUF file. Arrays stay in the file.

    Raises ModelError when it is truncated, corrupted or absurd.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < 24:
                raise ModelError(f"{path} is too short to be a GGUF file; copy it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); check the path and its permissions") from None


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.size = path, data, 0, len(data)
        self.text_left, self.strings_left = MAX_TEXT, MAX_STRINGS

    def bad(self, what: str) -> ModelError:
        return ModelError(f"{self.path} is not a usable GGUF file: {what}; copy it again")

    def skip(self, count: int) -> int:
        start = self.at
        if count > self.size - start:
            raise self.bad(f"it ends before byte {start + count}")
        self.at = start + count
        return start

    def scalar(self, kind: str) -> Any:
        code = _SCALARS[kind]
        return struct.unpack_from(code, self.data, self.skip(struct.calcsize(code)))[0]

    def text(self, longest: int = MAX_TEXT) -> str:
        length = self.scalar("uint64")
        if length > min(longest, self.text_left):
            raise self.bad(f"a text of {length} bytes, more than a header needs")
        self.text_left -= length
        start = self.skip(length)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad("a text that is not UTF-8") from None

    def kind(self) -> str:
        number = self.scalar("uint32")
        if number >= len(_KINDS):
            raise self.bad(f"a value of the unknown type {number}")
        return _KINDS[number]

    def array(self) -> GGUFArray:
        kind, count = self.kind(), self.scalar("uint64")
        if kind == "array":
            raise self.bad("an array of arrays")
        smallest = 8 if kind == "string" else struct.calcsize(_SCALARS[kind])
        if count > (self.size - self.at) // smallest:
            raise self.bad(f"an array of {count} values, more than the file holds")
        start = self.at
        if kind == "string":
            self.strings_left -= count
            if self.strings_left < 0:
                raise self.bad(f"an array of {count} texts, more than a header needs")
            for _ in range(count):
                self.skip(self.scalar("uint64"))
        else:
            self.skip(count * smallest)
        return GGUFArray(file=self.path, kind=kind, count=count, offset=start, nbytes=self.at - start)

    def header(self) -> GGUFHeader:
        if self.data[:4] != b"GGUF":
            raise self.bad("it does not start with GGUF")
        self.skip(4)
        version, tensors, pairs = self.scalar("uint32"), self.scalar("uint64"), self.scalar("uint64")
        if version not in (2, 3):
            raise self.bad(f"version {version} instead of 2 or 3")
        if max(tensors, pairs) > MAX_ENTRIES:
            raise self.bad(f"{tensors} tensors and {pairs} keys")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key, kind = self.text(1 << 16), self.kind()
            if key in metadata:
                raise self.bad(f"the key {key[:80]!r} twice")
            metadata[key] = self.array() if kind == "array" else self.text() if kind == "string" else self.scalar(kind)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self.bad(f"an alignment of {str(alignment)[:40]}")
        table = [self.tensor(alignment) for _ in range(tensors)]
        return GGUFHeader(file=self.path, metadata=metadata, tensors=self.placed(table, alignment))

    def tensor(self, alignment: int) -> GGUFTensor:
        name, dims = self.text(256), self.scalar("uint32")
        if not 1 <= dims <= 4:
            raise self.bad(f"{name[:80]!r} has {dims} dimensions")
        shape = [self.scalar("uint64") for _ in range(dims)]
        number, offset = self.scalar("uint32"), self.scalar("uint64")
        if min(shape) < 1 or math.prod(shape) > MAX_ELEMENTS:
            raise self.bad(f"{name[:80]!r} claims the absurd shape {shape}")
        if number not in GGML_TYPES:
            raise self.bad(f"{name[:80]!r} has the unknown type {number}")
        kind, block, block_bytes = GGML_TYPES[number]
        if shape[0] % block:
            raise self.bad(f"{name[:80]!r} has rows of {shape[0]}, which {kind} cannot hold")
        if offset % alignment:
            raise self.bad(f"{name[:80]!r} does not start on a multiple of {alignment}")
        nbytes = math.prod(shape) // block * block_bytes
        return GGUFTensor(name=name, shape=tuple(reversed(shape)), type=kind, offset=offset, nbytes=nbytes)

    def placed(self, table: list[GGUFTensor], alignment: int) -> tuple[GGUFTensor, ...]:
        start = -(-self.at // alignment) * alignment
        if len({t.name for t in table}) != len(table):
            raise self.bad("two tensors of one name")
        end = 0
        for tensor in sorted(table, key=lambda t: t.offset):
            if tensor.offset < end:
                raise self.bad(f"{tensor.name[:80]!r} overlaps another tensor")
            end = tensor.offset + tensor.nbytes
            if start + end > self.size:
                raise self.bad(f"it is truncated, {tensor.name[:80]!r} ends {start + end - self.size} bytes after it")
        return tuple(
            GGUFTensor(name=t.name, shape=t.shape, type=t.type, offset=start + t.offset, nbytes=t.nbytes) for t in table
        )
