"""GGUF: one file with header, tokenizer and tensors, each tensor in a storage type of its own.

A storage type packs a row in blocks (32 values in Q4_0, 256 in the K types) with a scale per block, so the row's width
must be a multiple of the block. The plan's types are obeyed: where one does not fit, nothing is written and the error
names the tensors, their widths and the types that would fit. Vectors, and GPT-2's position table, stay F32.

    bytes of a matrix = rows x columns / block values x block bytes        (Q4_0: 18 bytes per 32 values)

One tensor at a time is read, transformed, packed and written; the file appears when it is complete.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fivefold.errors import ModelError, NotFinite, RecipeError
from fivefold.export.families import Family, family_of, frequency_divisors, header, transform
from fivefold.export.tokenizer import add_tokenizer
from fivefold.files import storage, sync
from fivefold.model import Blueprint, Model, blueprint_of, read_config
from fivefold.weights import StoredTensor, copy_side_files, read_solved, read_tensors

if TYPE_CHECKING:
    from gguf import GGUFWriter

SIDE = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
    "special_tokens_map.json",
)
IGNORED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
FILE_TYPES = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M"}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A tensor under its exported `name`: `shape` is (rows, columns) or (n,), `source` the tensor it is made from."""

    name: str
    shape: tuple[int, ...]
    source: StoredTensor
    family: Family
    config: Mapping[str, Any]
    blueprint: Blueprint

    @property
    def is_matrix(self) -> bool:
        """Whether the plan chooses its type; the rest is always F32."""
        return len(self.shape) == 2 and self.name != "position_embd.weight"

    def numpy(self) -> NDArray[np.float32]:
        values = transform(self.family, self.name, self.source.numpy(), self.config, self.blueprint)
        if not np.isfinite(values).all():
            raise NotFinite(f"{self.source.name} holds NaN or infinity")
        return np.ascontiguousarray(values, np.float32)


@functools.cache
def _name_map(arch: str, layers: int) -> Any:
    from gguf import MODEL_ARCH, get_tensor_name_map

    return get_tensor_name_map(MODEL_ARCH[arch.upper()], layers)


def exported_tensors(folder: Path) -> dict[str, Exported]:
    """Exported name -> tensor, for a Hugging Face folder; nothing is read. What techniques plan types with."""
    config = read_config(folder)
    family, blueprint = family_of(config), blueprint_of(config)
    names = _name_map(family.arch, blueprint.layers)
    out: dict[str, Exported] = {}
    for source_name, source in read_tensors(folder):
        if source_name.endswith(IGNORED) or (blueprint.tied and source_name == "lm_head.weight"):
            continue
        name = names.get_name(source_name, (".weight", ".bias"))
        if name is None:
            raise ModelError(
                f"{source_name} of {folder.name} has no place in llama.cpp's {family.arch}; serve it with torch instead"
            )
        turned = family.conv1d and len(source.shape) == 2 and name.startswith("blk.")
        out[name] = Exported(
            name=name, shape=source.shape[::-1] if turned else source.shape, source=source, family=family,
            config=config, blueprint=blueprint,
        )
    if "output.weight" not in out and not blueprint.tied:
        raise ModelError(
            f"{folder.name} has no lm_head.weight although its embedding is not tied; copy the model again"
        )
    return dict(sorted(out.items(), key=lambda item: _position(item[0])))


def _position(name: str) -> tuple[int, int, str]:
    parts = name.split(".")
    return (1, int(parts[1]), name) if parts[0] == "blk" else (0 if parts[0] == "token_embd" else 2, 0, name)


def fitting_types(width: int) -> list[str]:
    """Storage types that can hold rows of `width` values."""
    from fivefold.engines._quantize import types

    return [name for name, kind in types().items() if width % kind.block == 0]


def write_gguf(model: Model, folder: Path) -> Model:
    """`folder/model.gguf` with the tokenizer files beside it, as `model.export` says."""
    from gguf import GGUFWriter

    tensors = exported_tensors(model.path)
    solved = read_solved(model.export.solved) if model.export.solved else {}
    types = _types(model, tensors, {name: kind for name, (kind, _) in solved.items()})
    some = next(iter(tensors.values()))
    target = folder / "model.gguf"
    partial = folder / f".model.gguf.{os.getpid()}"
    writer = GGUFWriter(partial, some.family.arch)
    try:
        with storage(target):
            folder.mkdir(parents=True, exist_ok=True)
            notes = _add_header(writer, model, some, types)
            notes += add_tokenizer(writer, model.path, some.blueprint.vocab)
            _write_tensors(writer, model, tensors, types, solved)
            writer.close()
            sync(partial)
            copy_side_files(model.path, folder, SIDE)
            os.replace(partial, target)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    done = model.but(path=target, format="gguf")
    for note in (_counted(tensors, types, target.stat().st_size), *notes):
        done = done.covered(note)
    return done


def _types(model: Model, tensors: Mapping[str, Exported], solved: Mapping[str, str]) -> dict[str, str]:
    """Exported name -> storage type. Raises ModelError for unknown names and types, and for types that do not fit."""
    from fivefold.engines._quantize import fits, types

    plan = model.export
    unknown = sorted({*plan.types, *solved} - set(tensors))
    if unknown:
        raise ModelError(f"the export plan names tensors that {model.name} does not have: {', '.join(unknown[:3])}")
    chosen, misfits = {}, []
    for name, tensor in tensors.items():
        kind = plan.types.get(name) or (plan.embedding if name == "token_embd.weight" else None) or plan.default
        kind = solved.get(name, kind).lower() if tensor.is_matrix else "f32"
        if kind not in types():
            raise ModelError(f"{kind!r} is no storage type of llama.cpp; types that fit {name}: {_spelled(tensor)}")
        if not fits(kind, tensor.shape[-1]):
            misfits.append((name, kind))
        chosen[name] = kind.upper()
    if misfits:
        name, kind = misfits[0]
        raise ModelError(
            f"{kind} does not fit {len(misfits)} tensors of {model.name}, such as {name} with rows of"
            f" {tensors[name].shape[-1]}; types that fit: {_spelled(tensors[name])}"
        )
    return chosen


def _spelled(tensor: Exported) -> str:
    return ", ".join(fitting_types(tensor.shape[-1]))


def _add_header(writer: GGUFWriter, model: Model, some: Exported, types: Mapping[str, str]) -> list[str]:
    from gguf import LlamaFileType

    writer.add_type("model")
    writer.add_name(model.name)
    packed = Counter(kind for name, kind in types.items() if name.startswith("blk.") and kind != "F32")
    common = packed.most_common(1)[0][0] if packed else "F32"
    named = FILE_TYPES.get(common, f"MOSTLY_{common}")
    writer.add_file_type(LlamaFileType[named] if named in LlamaFileType.__members__ else LlamaFileType.GUESSED)
    writer.add_quantization_version(2)
    for key, value in header(some.family, some.config, some.blueprint).items():
        key = f"{some.family.arch}.{key}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    window = some.config.get("sliding_window")
    if window and some.family.arch == "llama" and window < some.blueprint.context:
        return [f"gguf: llama.cpp does not apply the sliding window of {window} tokens; keep contexts within it"]
    return []


def _write_tensors(
    writer: GGUFWriter, model: Model, tensors: Mapping[str, Exported], types: Mapping[str, str],
    solved: Mapping[str, tuple[str, StoredTensor]],
) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    some = next(iter(tensors.values()))
    divisors = frequency_divisors(some.config, some.blueprint) if some.family.arch != "gpt2" else None
    if divisors is not None:
        writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    for name, tensor in tensors.items():
        kind = GGMLQuantizationType[types[name]]
        block, size = GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(tensor.shape)) // block * size
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        if name in solved and solved[name][1].nbytes != nbytes:
            raise ModelError(f"the solved {name} has {solved[name][1].nbytes} bytes where {kind.name} needs {nbytes}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if divisors is not None:
        writer.write_tensor_data(divisors)
    importance = _importance(model)
    for name, tensor in tensors.items():
        if name in solved:
            writer.write_tensor_data(np.array(solved[name][1].raw()))
        else:
            writer.write_tensor_data(pack(tensor.numpy(), types[name], importance.get(name), name))


def _importance(model: Model) -> dict[str, StoredTensor]:
    if model.export.importance is None:
        return {}
    from fivefold.weights import check_safetensors

    return check_safetensors(model.export.importance)


def pack(
    values: NDArray[np.float32], kind: str, importance: StoredTensor | None, name: str
) -> NDArray[np.uint8]:
    """`values` in storage type `kind`, as bytes. `importance` weighs the columns of the rounding error."""
    if values.ndim == 1 or kind == "F32":
        return values.reshape(-1).view(np.uint8)
    from fivefold.engines._quantize import quantize

    weights = None if importance is None else importance.numpy().reshape(-1)
    try:
        return quantize(values, kind, weights)
    except RecipeError as error:
        raise ModelError(f"{name} cannot be stored as {kind.lower()}: {error}") from None


def _counted(tensors: Mapping[str, Exported], types: Mapping[str, str], size: int) -> str:
    matrices = Counter(types[name] for name, tensor in tensors.items() if tensor.is_matrix)
    said = ", ".join(f"{count} {kind}" for kind, count in matrices.most_common())
    rest = len(tensors) - sum(matrices.values())
    return f"gguf: {sum(matrices.values())} matrices ({said}), {rest} vectors F32; {size} bytes"
