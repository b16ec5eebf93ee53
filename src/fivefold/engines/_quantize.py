"""Matrices to and from ggml's storage types, by ggml's own code.

A ggml type stores each row in blocks of 32, 64, 128 or 256 weights with a shared scale, so a row must be a whole number
of blocks wide: rows of 576 fit the 32-, 64-wide types and not the K-quants (256). With an importance vector (the mean
square of each input column over calibration text) the scales minimise the weighted error; a few 1- and 2-bit types
exist only with one.

Rows are independent, and cffi releases the GIL during the call, so chunks of rows are quantized in threads.

Source: ggml/src/ggml-quants.c of llama.cpp (MIT).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from fivefold.engines._llama_abi import library
from fivefold.errors import NotFinite, RecipeError
from fivefold.weights import GGML_TYPES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TYPE_COUNT = 43
LARGEST_HALF = 65504.0
CHUNK = 1 << 18
UNBOUNDED = ("f32", "bf16")


@dataclass(frozen=True, kw_only=True)
class StorageType:
    """`block` weights are stored in `block_bytes`; `number` is ggml's own."""

    name: str
    number: int
    block: int
    block_bytes: int
    needs_importance: bool

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.block_bytes / self.block


@cache
def types() -> dict[str, StorageType]:
    """Every type this engine can multiply with, quantize to and find in a GGUF file; by lower-case name."""
    ffi, lib = library()
    found = {}
    for number in (n for n in GGML_TYPES if n < TYPE_COUNT):
        traits, cpu = lib.ggml_get_type_traits(number), lib.ggml_get_type_traits_cpu(number)
        if traits.blck_size > 0 and cpu.vec_dot and (traits.to_float or number == 0):
            name = ffi.string(traits.type_name).decode().lower()
            found[name] = StorageType(
                name=name, number=number, block=traits.blck_size, block_bytes=traits.type_size,
                needs_importance=lib.ggml_quantize_requires_imatrix(number),
            )
    return found


def storage_type(name: str) -> StorageType:
    """Raises RecipeError when the engine has no such type."""
    try:
        return types()[name.lower()]
    except KeyError:
        raise RecipeError(f"llama.cpp has no type {name!r}; types: {', '.join(types())}") from None


def fits(type: str, cols: int) -> bool:
    """Can a row of `cols` weights be stored as `type`?"""
    return cols > 0 and cols % storage_type(type).block == 0


def row_bytes(type: str, cols: int) -> int:
    """Bytes of one row. Raises RecipeError when the width does not fit."""
    kind = storage_type(type)
    if not fits(type, cols):
        raise RecipeError(
            f"rows of {cols} weights cannot be stored as {type}, whose blocks hold {kind.block};"
            " choose a type with smaller blocks for this tensor"
        )
    return cols // kind.block * kind.block_bytes


def quantize(
    matrix: NDArray[np.float32], type: str, importance: NDArray[np.float32] | None = None, threads: int = 2
) -> NDArray[np.uint8]:
    """float32 (rows, cols) -> bytes (rows, row_bytes). `importance` is (cols,), non-negative.

    Only the ratios within `importance` matter; zeros count as a millionth of its mean. Raises RecipeError when the
    type cannot hold such rows or needs an importance vector, NotFinite on NaN, infinity or values above 65504 (the
    largest half-precision scale), except for f32 and bf16, which hold them.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    kind = storage_type(type)
    rows, cols = matrix.shape
    source = np.ascontiguousarray(matrix, np.float32)
    out = np.empty((rows, row_bytes(type, cols)), np.uint8)
    _check_values(source, kind)
    weights = _importance(importance, cols, kind)
    ffi, lib = library()
    lib.ggml_quantize_init(kind.number)
    from_, to = ffi.from_buffer("float[]", source), ffi.from_buffer(out)
    pointer = ffi.NULL if weights is None else ffi.from_buffer("float[]", weights)
    step = max(1, CHUNK // cols)

    def chunk(first: int) -> int:
        count = min(step, rows - first)
        return int(lib.ggml_quantize_chunk(kind.number, from_, to, first * cols, count, cols, pointer))

    starts = range(0, rows, step)
    if min(threads, len(starts)) <= 1:
        written = sum(map(chunk, starts))
    else:
        with ThreadPoolExecutor(threads) as pool:
            written = sum(pool.map(chunk, starts))
    if written != out.size:
        raise RecipeError(
            f"llama.cpp cannot quantize to {type} (it wrote {written} of {out.size} bytes); choose another type"
        )
    return out


def dequantize(data: Any, type: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Bytes of a (rows, cols) matrix stored as `type` -> float32 (rows, cols)."""
    import numpy as np

    rows, cols = shape
    kind = storage_type(type)
    stored = np.frombuffer(data, np.uint8) if isinstance(data, bytes | memoryview) else np.ascontiguousarray(data)
    stored = stored.reshape(-1).view(np.uint8)
    if stored.size != rows * row_bytes(type, cols):
        raise ValueError(f"{stored.size} bytes are not a {rows} x {cols} matrix of {type}")
    if kind.number == 0:
        return stored.view(np.float32).reshape(shape).copy()
    ffi, lib = library()
    out = np.empty(shape, np.float32)
    to_float = lib.ggml_get_type_traits(kind.number).to_float
    to_float(ffi.from_buffer(stored), ffi.from_buffer("float[]", out), rows * cols)
    return out


def _check_values(source: NDArray[np.float32], kind: StorageType) -> None:
    import numpy as np

    largest = float(np.abs(source).max(initial=0.0))
    if not np.isfinite(largest):
        raise NotFinite("the matrix holds NaN or infinity and cannot be quantized")
    if largest > LARGEST_HALF and kind.name not in UNBOUNDED:
        raise NotFinite(f"the matrix holds {largest:g}, above the largest scale {kind.name} can store (65504)")


def _importance(importance: Any, cols: int, kind: StorageType) -> NDArray[np.float32] | None:
    if importance is None:
        if kind.needs_importance:
            raise RecipeError(
                f"{kind.name} exists only with an importance vector; calibrate one, or choose iq3_xxs or larger"
            )
        return None
    import numpy as np

    weights = np.array(importance, np.float64)
    if weights.shape != (cols,) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise RecipeError(
            f"an importance vector of shape {weights.shape} and sum {weights.sum():g} does not suit rows of {cols};"
            " give one finite non-negative number per column, not all zero"
        )
    return np.maximum(weights / weights.mean(), 1e-6).astype(np.float32)
