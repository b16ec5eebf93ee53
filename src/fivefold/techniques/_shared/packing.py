"""Which matrices of a model folder the torch engine can store in 8 or 4 bits, and doing it.

A matrix inside a layer is a linear layer; outside there are the token embedding and the head, which stay as they are
or go to 8 bits together. One matrix is in memory at a time.
"""

from __future__ import annotations

import re

from fivefold.errors import Misfit
from fivefold.model import Model
from fivefold.techniques._shared.modules import workspace
from fivefold.weights import read_tensors

Layers = dict[str, tuple[int, int]]
Shapes = dict[str, tuple[int, int]]
_INSIDE = re.compile(r"(?:.*\.)?layers\.\d+\..+")
_HEAD = re.compile(r"(?:.*\.)?(embed_tokens|lm_head)")


def linear_shapes(model: Model, owner: str) -> tuple[Shapes, list[str]]:
    """Module name -> (rows, columns) of every linear layer, and the names of embedding and head. Raises Misfit."""
    found, head = {}, []
    for name, tensor in read_tensors(model.path):
        module = name.removesuffix(".weight")
        if module == name or len(tensor.shape) != 2:
            continue
        rows, columns = tensor.shape
        if _INSIDE.fullmatch(module):
            found[module] = (rows, columns)
        elif _HEAD.fullmatch(module) and not (model.blueprint.tied and module.endswith("lm_head")):
            head.append(module)
    if not found:
        family = model.blueprint.family
        raise Misfit(f'{owner} finds no linear layers in a model of {family}; use gguf(type="q8_0") instead')
    return found, head


def packed(model: Model, technique: str, layers: Layers) -> Model:
    """A model whose `layers` (module -> bits, group) are packed, in a new folder."""
    from fivefold.engines._layers.packed import write_packed

    return model.but(path=write_packed(model.path, workspace(model, technique), layers))
