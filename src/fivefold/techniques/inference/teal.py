"""Skipping inputs near zero while decoding: half of the activations go, and the weights they would have met.

A linear layer computes sum_j x_j W[:, j]. Where |x_j| is small its column hardly matters and need not be read. In
front of every linear layer the smallest fraction `sparsity` of |x_j| is set to zero by a fixed threshold, the quantile
on calibration text; nothing is trained. Most inputs are bell-shaped or peaked around zero, so the dropped half holds
a few per cent of the squares. Weights are stored by input, so what is skipped is a run of bytes, and a kernel of our
own (`engines/native/gather.cpp`) reads the rest: bytes per token fall by the sparsity.

`allocation="greedy"` divides the sparsity within each layer: in small steps, each given to the site (queries, keys and
values; attention output; gate and up; down) where it changes the layer's output least per byte skipped, until the
layer's average over its weights is reached. "uniform" gives every site the same.

It pays when one token at a time is decoded and reading weights is the time. A batch has few zeros in common, and a
prompt reads all weights: prompts and scored texts are computed by the same function with the zeros put in, so the
measured quality is that of decoding, and they gain nothing. Only the first token of a prompt is dense, to which nearly
all others attend (the paper leaves more of the beginning dense). Embedding and head are dense. Weights become bfloat16.

Source: Liu et al., Training-Free Activation Sparsity in Large Language Models (TEAL), arXiv 2408.14690.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search
from fivefold.techniques._shared.activation_sparsity import compiled, gated, linear_count

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Teal(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.FLOAT_WEIGHTS, Trait.TRAINABLE})
    lowers = {"compute": "direct", "energy": "direct", "money": "direct", "memory": "indirect", "network": "indirect"}
    headline = "1.53x/1.8x decoding at 40-50% sparsity of all hidden states"
    perturbation = 3.5

    sparsity: Annotated[float, Range(0.0, 0.95), Search(0.25, 0.4, 0.5, 0.6)] = 0.4
    """Fraction of every layer's weights that a token skips, because the inputs they meet become zero."""
    allocation: Literal["greedy", "uniform"] = "greedy"
    """How the sparsity is divided within a layer; "greedy" takes about forty trials per layer."""
    windows: Annotated[int, Range(1, 4096), Fixed()] = 8
    """Calibration windows of 512 tokens."""

    def check(self, model: Model) -> None:
        linear_count(model, str(self))
        compiled(str(self))

    def plan(self, model: Model) -> Model:
        return model.but(export=model.export.storing(16.0))

    def effort(self, model: Model) -> float:
        if self.allocation == "uniform":
            return 0.0
        b = model.blueprint
        return (4 + 80 * self.sparsity) * 512 * 2.0 * (b.matrix_parameters - b.vocab * b.width)

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.activation_sparsity import bfloat16, computes_as_named, stored
        from fivefold.techniques._shared.calibration import windows
        from fivefold.techniques._shared.modules import linears, matrix
        from fivefold.training.module import load_module

        tokens = windows(model, self.windows)
        module = load_module(model)
        found = self.thresholds(module, tokens)
        names, kind = gated(model)
        fused = {n: m for n in names if kind and computes_as_named(m := module.get_submodule(n))}
        layers: dict[str, dict[str, Any]] = {}
        tensors: dict[str, dict[str, Any]] = {}
        for name, mlp in fused.items():
            cuts = {"threshold": found.pop(f"{name}.gate_proj"), "threshold_down": found.pop(f"{name}.down_proj")}
            found.pop(f"{name}.up_proj")
            layers[name] = {"kind": "thresholded_ffn", "activation": kind, **cuts}
            tensors[name] = {
                "gate_up": bfloat16(matrix(mlp.gate_proj), matrix(mlp.up_proj), turn=True),
                "down": bfloat16(matrix(mlp.down_proj), turn=True),
            }
        for name, cut in found.items():
            layers[name] = {"kind": "thresholded", "threshold": cut}
            tensors[name] = {"columns": bfloat16(matrix(module.get_submodule(name)), turn=True)}
        total = len(dict(linears(module)))
        said = (f"teal: {len(found) + 3 * len(fused)} of {total} linear layers drop inputs, {self.sparsity:g} of a"
                f" layer's weights are skipped ({self.allocation}); embedding and head dense")
        return stored(model, "teal", layers, tensors).covered(said)

    def thresholds(self, module: Any, tokens: NDArray[np.int64]) -> dict[str, float]:
        """Linear layer -> threshold, over `tokens` (rows, length)."""
        from fivefold.techniques._shared.activation_sparsity import thresholding, wrapped
        from fivefold.techniques._shared.modules import forward, layers, linears
        from fivefold.techniques._shared.sparsity_allocation import allocated

        parts = dict(linears(module))
        found: dict[str, float] = {}

        def around(layer: Any, forward: Any) -> Any:
            def treated(*args: Any, **kwargs: Any) -> Any:
                inside = {id(part) for part in layer.modules()}
                own = {name: part for name, part in parts.items() if id(part) in inside}
                shares = dict.fromkeys(own, self.sparsity)
                if self.allocation == "greedy" and self.sparsity:
                    shares |= allocated(forward, args, kwargs, own, self.sparsity)
                with thresholding(own, shares.__getitem__) as cuts:
                    out = forward(*args, **kwargs)
                found.update(cuts)
                return out
            return treated

        with wrapped(layers(module), around):
            forward(module, tokens)
        return found
