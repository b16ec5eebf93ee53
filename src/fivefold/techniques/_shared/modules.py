"""A model folder as a torch module, and the way back.

Loading runs no code of the folder and reads no pickle: a family transformers knows, safetensors only. What a
technique changed is written as a new folder; every tensor it did not touch is copied as it lies on disk.

    h = embed(tokens);  for layer in layers: h = layer(h);  logits = head(norm(h))

is the shape of every decoder here, whatever the family calls its parts (GPT-2's Conv1D is a linear layer whose matrix
is stored as (in, out)).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fivefold.errors import ModelError
from fivefold.model import Model, blueprint_of, read_config
from fivefold.weights import StoredTensor, read_tensors, write_safetensors_folder

if TYPE_CHECKING:
    import torch
    from torch import nn


def layers(module: Any) -> nn.ModuleList:
    """The decoder's layers, in order."""
    from torch import nn

    depth = module.config.num_hidden_layers
    for part in module.base_model.modules():
        if isinstance(part, nn.ModuleList) and len(part) == depth:
            return part
    raise ModelError(f"no list of {depth} layers in the family {module.config.model_type}; it cannot be treated")


def linears(module: Any) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every linear layer inside the decoder's layers, in order; the head is not among them."""
    inside = {id(part) for layer in layers(module) for part in layer.modules()}
    for name, part in module.named_modules():
        if id(part) in inside and is_linear(part):
            yield name, part


def is_linear(part: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(part, nn.Linear | Conv1D)


def matrix(part: Any) -> torch.Tensor:
    """The weight of a linear layer as a view of shape (outputs, inputs)."""
    from torch import nn

    weight: torch.Tensor = part.weight.data
    return weight if isinstance(part, nn.Linear) else weight.T


def forward(module: Any, tokens: Any) -> torch.Tensor:
    """Final hidden states, what the head reads; shape (rows, length, width). The logits are never made."""
    import torch

    with torch.inference_mode():
        out: torch.Tensor = module.base_model(input_ids=torch.as_tensor(tokens), use_cache=False).last_hidden_state
    return out


def workspace(model: Model, technique: str) -> Path:
    """A path below the builder's scratch folder that does not exist yet."""
    import tempfile

    base = model.work or Path(tempfile.mkdtemp(prefix="fivefold."))
    folder = base / technique
    number = 2
    while folder.exists():
        folder, number = base / f"{technique}.{number}", number + 1
    return folder


def rewritten(
    model: Model, technique: str, tensors: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> Model:
    """A model whose weights are `tensors` (torch, numpy or stored), in a new folder with the small files of the old."""
    folder = write_safetensors_folder(workspace(model, technique), tensors, like=model.path, config=config)
    return model.but(path=folder, blueprint=blueprint_of(read_config(folder)), origin=model.parent)


def stored_tensors(model: Model) -> dict[str, StoredTensor]:
    return dict(read_tensors(model.path))
