"""Layers stored otherwise than as a float matrix, in the torch engine: one file per kind, and the folder format.

A folder is a Hugging Face folder with a `layers.json`,

    {"version": 1, "layers": {"model.layers.0.mlp.up_proj": {"kind": "packed", "bits": 4, "group": 64}, ...}}

and `<module>.weight` of each listed module is replaced by the tensors its kind names. A kind is a module here with

    TENSORS                                     suffixes of the tensors that belong to it: ("qweight", "scale", ...)
    build(old, tensors, settings, dtype)        the module to put in the place of `old` (or `old` itself, changed)

`build` raises KeyError, TypeError, ValueError or RuntimeError when tensors or settings are not what it wrote; the
loader tells that in one sentence. What a kind computes and how it was chosen is no business of this folder: techniques
write, kinds read. A built module says what it holds in its attribute `stored` ("int4"), for the session's description.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.errors import ModelError
from fivefold.weights import StoredTensor, read_tensors, write_safetensors_folder

MANIFEST = "layers.json"

Settings = dict[str, Any]


def kinds() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def kind(name: str) -> Any:
    """The module of a kind. Raises KeyError for a name that is not a file here."""
    if name not in kinds():
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}")


def write_layers(
    source: Path, target: Path, layers: Mapping[str, Settings],
    make: Callable[[str, StoredTensor, Settings], Mapping[str, Any]],
) -> Path:
    """Copy the model folder `source` to the new folder `target`, the matrix of each of `layers` as `make` stores it.

    `make(name, matrix, settings)` gives the tensors by suffix; one matrix at a time is in memory in float. Settings
    hold "kind" and what `build` needs. Layers of `source` that were stored so before stay. Raises ModelError for a
    layer that is not there.
    """
    stored = dict(read_tensors(source))
    tensors: dict[str, Any] = dict(stored)
    for name, settings in layers.items():
        if (weight := tensors.pop(f"{name}.weight", None)) is None:
            raise ModelError(f"{source} has no matrix {name}.weight; leave the layer out")
        tensors.update({f"{name}.{k}": v for k, v in make(name, weight, settings).items()})
    return write_safetensors_folder(target, tensors, like=source, texts={MANIFEST: manifest(source, layers)})


def manifest(source: Path, layers: Mapping[str, Settings]) -> str:
    """The text of layers.json for a folder made from `source` with `layers` more; for kinds of several matrices."""
    before = read_manifest(source) if (source / MANIFEST).is_file() else {}
    return json.dumps({"version": 1, "layers": {**before, **layers}}, indent=1) + "\n"


def read_manifest(folder: Path) -> dict[str, Settings]:
    """The `layers` of layers.json. Raises ModelError when it is not what `write_layers` writes."""
    file = folder / MANIFEST
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        layers: dict[str, Settings] = data["layers"]
        if data["version"] == 1 and all(layer["kind"] in kinds() for layer in layers.values()):
            return layers
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ModelError(f"{file} is not a list of layers this version reads; make the artifact again")


def load_layers(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The transformers model of such a folder; what no kind stores is in `dtype`. Raises ModelError."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = read_manifest(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = {name: stored.torch() for name, stored in read_tensors(folder)}
    for name, settings in layers.items():
        _replace(model, name, settings, tensors, dtype, folder)
    rest = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    _, surplus = model.load_state_dict(rest, strict=False, assign=True)
    if getattr(config, "tie_word_embeddings", False):
        _tie(model)
    lacking = [n for n, p in model.named_parameters() if p.is_meta]
    if lacking or surplus:
        what = f"lacks {lacking[0]}" if lacking else f"holds {surplus[0]}, which the model has not"
        raise ModelError(f"{folder} {what}; make the artifact again")
    return model.eval()


def _replace(
    model: nn.Module, name: str, settings: Settings, tensors: dict[str, Tensor], dtype: torch.dtype, folder: Path
) -> None:
    try:
        reader = kind(settings["kind"])
        found = {k: t for k in reader.TENSORS if (t := tensors.pop(f"{name}.{k}", None)) is not None}
        parent, _, leaf = name.rpartition(".")
        new = reader.build(model.get_submodule(name), found, settings, dtype)
        setattr(model.get_submodule(parent), leaf, new)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        raise ModelError(f"{folder} has no usable stored layer {name[:80]!r}; make the artifact again") from None


def _tie(model: nn.Module) -> None:
    embedding: Any = model.get_input_embeddings()
    if hasattr(embedding, "as_head"):
        model.set_output_embeddings(embedding.as_head())
    elif not hasattr(head := model.get_output_embeddings(), "stored"):
        head.weight = embedding.weight
