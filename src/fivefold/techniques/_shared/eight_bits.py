"""Storing linear layers for 8-bit products of weights and activations, and the largest inputs they meet.

One matrix is in memory at a time; the peaks of all layers are one vector each, from one pass over calibration text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fivefold.model import Model
from fivefold.techniques._shared.modules import forward, linears, workspace

if TYPE_CHECKING:
    from torch import Tensor

    from fivefold.weights import StoredTensor

KIND = "int8_activations"


def stored(
    model: Model, technique: str, layers: Iterable[str], *, source: Path | None = None,
    beside: Mapping[str, Tensor] | None = None, limit: float = math.inf,
) -> Model:
    """A model whose `layers` are in 8 bits with 8-bit activations, in a new folder; the rest as in `source` or itself.

    `beside` gives columns (module -> indices) that stay in 16 bits, `limit` the magnitude above which inputs do.
    """
    from fivefold.engines._layers import write_layers
    from fivefold.engines._layers.int8_activations import pack

    columns = beside or {}

    def make(name: str, weight: StoredTensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        return pack(weight.torch(), columns.get(name))

    settings: dict[str, Any] = {"kind": KIND} if math.isinf(limit) else {"kind": KIND, "limit": limit}
    target = workspace(model, technique)
    return model.but(path=write_layers(source or model.path, target, {name: dict(settings) for name in layers}, make))


def input_peaks(module: Any, tokens: Any) -> dict[str, Tensor]:
    """Name -> largest magnitude of each input column (columns,) of every linear layer, over `tokens` (rows, length)."""
    peaks: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, args: Any) -> None:
            found = args[0].detach().flatten(0, -2).abs().amax(0).float()
            peaks[name] = found.maximum(peaks[name]) if name in peaks else found
        return hook

    handles = [part.register_forward_pre_hook(watch(name)) for name, part in linears(module)]
    try:
        for row in tokens:
            forward(module, row[None])
    finally:
        for handle in handles:
            handle.remove()
    return peaks
