"""Dropping whole layers: those that change the hidden state least.

Every layer adds to a residual stream, and many add little. The influence of layer i is one minus the mean cosine
between what enters it and what leaves it, over the tokens of a calibration text:

    influence_i = 1 - mean_t  h_i[t] . h_(i+1)[t] / (|h_i[t]| |h_(i+1)[t]|)

The `layers` with the smallest influence are removed at once and the rest renumbered. What remains is an ordinary
smaller model: memory, time, energy, file and cache fall in proportion to the layers removed, in every engine. The
embedding and the head stay, so in small models with large vocabularies the saving is less than the share of layers.

It is a coarse cut: a few layers of a deep model cost little, but models under a billion parameters have few to spare,
and need `repair` after it: of the 30 of SmolLM2-135M four cost a KL of 0.60 and eight 2.7, more than as many parameters
as feed-forward channels (`prune_width`: 0.41 and 1.2). Influences are taken on the whole model; removing one layer
changes those of the others.

Source: Men et al., ShortGPT, arXiv 2403.03853.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from fivefold.errors import Misfit
from fivefold.model import Model, Trait, read_config
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class PruneDepth(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.DENSE_WEIGHTS, Trait.FULL_DEPTH, Trait.UNFITTED,
                       Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.FULL_DEPTH})
    lowers = {"compute": "direct", "memory": "direct", "energy": "direct", "money": "direct", "network": "direct"}
    headline = "~25% of the layers removed, ~92-95% kept"
    perturbation = 3.0

    layers: Annotated[int, Range(1, 1024), Search(1, 2, 3, 4, 6, 8)]
    """Layers to remove."""
    windows: Annotated[int, Range(1, 4096), Fixed()] = 8
    """Calibration windows of 512 tokens."""

    def check(self, model: Model) -> None:
        depth = model.blueprint.layers
        if self.layers >= depth:
            raise Misfit(f"{self} leaves nothing of a model of {depth} layers; remove at most {depth - 1}")

    def plan(self, model: Model) -> Model:
        return model.but(blueprint=replace(model.blueprint, layers=model.blueprint.layers - self.layers))

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.calibration import windows
        from fivefold.techniques._shared.modules import rewritten, stored_tensors
        from fivefold.training.module import load_module

        self.check(model)
        module = load_module(model)
        influence = influences(module, windows(model, self.windows))
        dropped = sorted(sorted(range(len(influence)), key=influence.__getitem__)[: self.layers])
        kept = [i for i in range(len(influence)) if i not in dropped]
        tensors = renumbered(stored_tensors(model), layer_prefix(module), kept)
        done = rewritten(model, "prune_depth", tensors, shortened(read_config(model.path), kept, len(influence)))
        which = ", ".join(map(str, dropped))
        return done.covered(f"prune_depth: {self.layers} of {len(influence)} layers removed ({which})")


def influences(module: Any, tokens: NDArray[np.int64]) -> list[float]:
    """One number per layer, over `tokens` (rows, length)."""
    import torch

    from fivefold.techniques._shared.modules import forward, layers

    found = layers(module)
    sums = [0.0] * len(found)

    def after(index: int, args: Any, kwargs: Any, output: Any) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        leaving = output[0] if isinstance(output, tuple) else output
        cosine = torch.nn.functional.cosine_similarity(entering.float(), leaving.float(), dim=-1)
        sums[index] += float(cosine.double().sum())

    handles = [
        layer.register_forward_hook(lambda _, args, kwargs, out, i=i: after(i, args, kwargs, out), with_kwargs=True)
        for i, layer in enumerate(found)
    ]
    try:
        for row in tokens:
            forward(module, row[None])
    finally:
        for handle in handles:
            handle.remove()
    return [1 - total / tokens.size for total in sums]


def layer_prefix(module: Any) -> re.Pattern[str]:
    """Matches a stored tensor of a layer: groups (before the number, number, after it)."""
    from fivefold.techniques._shared.modules import layers

    found = layers(module)
    name = next(name for name, part in module.named_modules() if part is found)
    base = re.escape(f"{module.base_model_prefix}.")
    inner = re.escape(name.removeprefix(f"{module.base_model_prefix}."))
    return re.compile(rf"((?:{base})?{inner}\.)(\d+)(\..+)")


def renumbered(tensors: Mapping[str, Any], pattern: re.Pattern[str], kept: Sequence[int]) -> dict[str, Any]:
    """The tensors without the layers that are not `kept`, and those with their new numbers."""
    place = {old: new for new, old in enumerate(kept)}
    out = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match is None:
            out[name] = tensor
        elif int(match[2]) in place:
            out[f"{match[1]}{place[int(match[2])]}{match[3]}"] = tensor
    return out


def shortened(config: Mapping[str, Any], kept: Sequence[int], depth: int) -> dict[str, Any]:
    """The config of the kept layers; lists with one entry per layer are cut alike."""
    out = dict(config)
    for key, value in config.items():
        if key in ("num_hidden_layers", "n_layer"):
            out[key] = len(kept)
        elif isinstance(value, list) and len(value) == depth:
            out[key] = [value[i] for i in kept]
    return out
