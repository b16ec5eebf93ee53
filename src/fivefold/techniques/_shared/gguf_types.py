"""ggml's storage types, and which of them the matrices of one model can take.

A type stores a row in blocks that share a scale: `block` weights in `block_bytes` bytes, hence 8 * block_bytes /
block bits per weight. A row must be a whole number of blocks wide. The K-quants and most i-quants have blocks of 256,
so a row of 576 cannot hold them; types of 32 (q8_0, q5_1, iq4_nl, ...) then can.

Names are those of the exported file (`blk.0.attn_q.weight`, `token_embd.weight`). They and the widths come from the
headers of the weight files alone. No torch here.

Source: ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path

from fivefold.errors import Misfit
from fivefold.model import Blueprint, Model

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
NEEDS_IMPORTANCE = frozenset({"iq2_s", "iq2_xs", "iq2_xxs", "iq1_s", "iq1_m"})
"""Below 3 bits the i-quants choose points of a lattice by importance and are not usable without it."""
IGNORES_IMPORTANCE = frozenset({"f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "mxfp4"})


@cache
def block(type: str) -> int:
    """Weights per block."""
    return _sizes(type)[0]


@cache
def bits(type: str) -> float:
    """Bits per weight, scales included."""
    weights, size = _sizes(type)
    return 8 * size / weights


def gguf_bytes(blueprint: Blueprint, storage: str, embedding: str | None) -> float:
    """Of all matrices in the type `storage`, the token embedding in another one if that is given."""
    table = blueprint.vocab * blueprint.width
    others = blueprint.parameters - table * (1 if blueprint.tied else 2)
    head = 0.0 if blueprint.tied else table * bits(storage)
    return (others * bits(storage) + head + table * bits(embedding or storage)) / 8


def fits(type: str, columns: int) -> bool:
    return columns % block(type) == 0


def _sizes(type: str) -> tuple[int, int]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    pair: tuple[int, int] = GGML_QUANT_SIZES[GGMLQuantizationType[type.upper()]]
    return pair


def matrices(model: Model) -> dict[str, tuple[int, int]]:
    """Exported tensor name -> (rows, columns) of every matrix of a safetensors folder, the embedding included.

    Columns are the inputs, the direction blocks run in. Raises ModelError for a family GGUF does not know.
    """
    stamps = tuple((f.name, f.stat().st_mtime_ns) for f in sorted(model.path.iterdir()) if f.suffix != ".txt")
    return dict(_matrices(model.path, stamps))


@lru_cache(maxsize=32)
def _matrices(path: Path, stamps: tuple[tuple[str, int], ...]) -> dict[str, tuple[int, int]]:
    """`stamps` changes when a file of the folder does; a search asks for the same shapes thousands of times."""
    from fivefold.export.gguf_ import exported_tensors

    found = {}
    for name, tensor in exported_tensors(path).items():
        if tensor.is_matrix:
            rows, columns = tensor.shape
            found[name] = (rows, columns)
    return found


def exported_names(model: Model) -> dict[str, str]:
    """Name of a stored tensor -> its name in the exported file, matrices only."""
    from fivefold.export.gguf_ import exported_tensors

    return {t.source.name: name for name, t in exported_tensors(model.path).items() if t.is_matrix}


def resolve(
    shapes: Mapping[str, tuple[int, int]], type: str, embedding: str, fallback: str | None, owner: str
) -> dict[str, str]:
    """Exported tensor name -> type: `type`, `embedding` for the token embedding, `fallback` where that does not fit.

    Raises Misfit when something does not fit and there is no fallback that does.
    """
    chosen = {name: embedding if name == EMBEDDING else type for name in shapes}
    misfits = {name: columns for name, (_, columns) in shapes.items() if not fits(chosen[name], columns)}
    if misfits and (fallback is None or not all(fits(fallback, columns) for columns in misfits.values())):
        wrong = Counter((chosen[name], columns) for name, columns in misfits.items())
        parts = [f"{count} of {len(shapes)} matrices have rows of {columns}, not a multiple of {kind}'s {block(kind)}"
                 for (kind, columns), count in sorted(wrong.items())]
        options = [t for t in ("q5_1", "q5_0", "iq4_nl", "q4_0", "f16") if all(fits(t, c) for c in misfits.values())]
        raise Misfit(f"{owner} does not fit: {'; '.join(parts)}; give fallback=\"{options[0]}\" or another type")
    return {name: str(fallback) if name in misfits else kind for name, kind in chosen.items()}


def sentence(shapes: Mapping[str, tuple[int, int]], types: Mapping[str, str], wanted: str, embedding: str) -> str:
    """Coverage, e.g. "q4_k: 30 of 211 matrices; 181 written as q5_0 because 576 is not a multiple of 256"."""
    reached = sum(kind == wanted for kind in types.values())
    text = f"{wanted}: {reached} of {len(types)} matrices"
    other: Counter[tuple[str, str]] = Counter()
    for name, kind in types.items():
        asked = embedding if name == EMBEDDING else wanted
        if kind != asked:
            other[kind, f"{shapes[name][1]} is not a multiple of {block(asked)}"] += 1
        elif kind != wanted:
            text += f"; embedding {kind}"
    return "; ".join([text, *(f"{n} written as {kind} because {why}" for (kind, why), n in sorted(other.items()))])
