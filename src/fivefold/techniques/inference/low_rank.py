"""Every linear layer as two thin matrices, chosen for the inputs it really gets.

A matrix of m x n is replaced by (m x r) (r x n), which has fewer weights and fewer multiplications when
r < m n / (m + n). Trained matrices are not of low rank, but their inputs fill few directions: with C = mean(x x^T) =
L L^T on calibration text, the product that changes the outputs least is the truncated singular value decomposition of
W L, times L^-1, and the squares of the singular values cut off are exactly its mean squared error. Layers are treated
from first to last, each seeing the inputs its treated predecessors give.

    weights kept = r (m + n) / (m n) = 1 - ratio,   r the same share of every layer

Lowers memory, file and arithmetic in the torch engine; each layer becomes two calls, so a small model on a CPU gains
less time than bytes. No format of llama.cpp holds two factors, so this does not go into a GGUF file. On SmolLM2-135M
10 % of all parameters removed this way cost a KL of 1.6 (13.5 when the inputs are not weighed), far more than pruning
as many channels: small models are nearly of full rank.

Sources: SVD-LLM (Wang et al., arXiv 2403.07378); ASVD (Yuan et al., arXiv 2312.05821).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fivefold.errors import Misfit, ModelError
from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from fivefold.engines._layers.low_rank import LowRankLinear
    from fivefold.weights import StoredTensor

WINDOW = 512
INSIDE = re.compile(r"(?:.*\.)?(?:layers|h)\.\d+\..+\.weight")


@dataclass(frozen=True, kw_only=True)
class LowRank(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.DENSE_WEIGHTS, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.FLOAT_WEIGHTS, Trait.TRAINABLE})
    lowers = {"memory": "direct", "network": "direct", "compute": "direct", "energy": "indirect", "money": "indirect"}
    may_raise = ("compute",)
    perturbation = 5.0

    ratio: Annotated[float, Range(0.0, 0.95), Search(0.1, 0.2, 0.3, 0.5)] = 0.2
    """Share of every linear layer's weights removed."""
    weigh: Literal["inputs", "nothing"] = "inputs"
    """What decides which directions stay: the layer's inputs on calibration text, or the weights alone."""
    windows: Annotated[int, Range(1, 4096), Fixed()] = 8
    """Calibration windows of 512 tokens."""

    def check(self, model: Model) -> None:
        if not self._shapes(model):
            raise Misfit(f"{self} finds no matrices inside the layers of a {model.blueprint.family}; leave it out")

    def _shapes(self, model: Model) -> dict[str, tuple[int, ...]]:
        """Stored matrices inside the layers, by module name."""
        from fivefold.weights import read_tensors

        return {name.removesuffix(".weight"): t.shape for name, t in read_tensors(model.path)
                if len(t.shape) == 2 and INSIDE.fullmatch(name)}

    def plan(self, model: Model) -> Model:
        return model.but(export=replace(model.export, kept=model.export.kept * (1 - self.ratio)))

    def effort(self, model: Model) -> float:
        b = model.blueprint
        return b.layers * 30.0 * (b.width**3 * 7 + b.width**2 * b.ffn)

    def apply(self, model: Model) -> Model:
        from fivefold.engines._layers import write_layers
        from fivefold.techniques._shared.calibration import windows
        from fivefold.techniques._shared.modules import workspace
        from fivefold.training.module import load_module

        self.check(model)
        module = load_module(model)
        shapes = self._shapes(model)
        tokens = windows(model, self.windows, WINDOW)
        thin, lost = self.factorize(module, tokens)
        if strange := sorted(thin.keys() - shapes.keys()):
            raise ModelError(f"{model.path} does not hold {strange[0]} under that name; save it with transformers")
        settings = {name: {"kind": "low_rank", "rank": len(layer.down)} for name, layer in thin.items()}

        def make(name: str, weight: StoredTensor, _: Any) -> dict[str, Any]:
            dtype = weight.torch().dtype
            return {"down": thin[name].down.to(dtype), "up": thin[name].up.to(dtype)}

        folder = write_layers(model.path, workspace(model, "low_rank"), settings, make)
        weights = sum(math.prod(shapes[name]) for name in thin)
        kept = sum(layer.down.numel() + layer.up.numel() for layer in thin.values())
        return model.but(path=folder, origin=model.parent).covered(
            f"low_rank: {len(thin)} of {len(shapes)} matrices in the layers, {kept} of {weights} numbers"
            f" ({1 - kept / weights:.1%} fewer), {lost:.2%} of the outputs' mean square lost on {tokens.size} tokens;"
            " embedding and head kept"
        )

    def factorize(self, module: Any, tokens: NDArray[np.int64]) -> tuple[dict[str, LowRankLinear], float]:
        """Replace every linear layer of `module`, in one pass over `tokens` (windows, length).

        The thin layers by name, and the mean share of a layer's outputs that was lost. Before a layer runs, a trial run
        of it collects what its own inputs are.
        """
        from fivefold.techniques._shared.factors import moments
        from fivefold.techniques._shared.modules import forward, layers, linears

        parts = dict(linears(module))
        thin: dict[str, LowRankLinear] = {}
        lost: list[float] = []

        def before(layer: Any, args: Any, kwargs: Any) -> None:
            inside = {id(part) for part in layer.modules()}
            own = {name: part for name, part in parts.items() if id(part) in inside}
            with moments(own) as seen:
                layer.forward(*args, **kwargs)
            for name in own:
                thin[name], share = self._thin(parts.pop(name), seen.mean(name))
                module.set_submodule(name, thin[name])
                lost.append(share)

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers(module)]
        try:
            forward(module, tokens)
        finally:
            for handle in handles:
                handle.remove()
        return thin, sum(lost) / len(lost)

    def _thin(self, part: Any, moment: torch.Tensor) -> tuple[LowRankLinear, float]:
        """The layer's replacement, and the share of its outputs' mean square that it loses."""
        from fivefold.engines._layers.low_rank import LowRankLinear
        from fivefold.techniques._shared.factors import factor, rank_of
        from fivefold.techniques._shared.modules import matrix

        weight = matrix(part)
        rows, columns = weight.shape
        down, up, _ = factor(weight, moment if self.weigh == "inputs" else None, rank_of(rows, columns, self.ratio))
        error = weight.double() - up @ down
        whole = float(((weight.double() @ moment) * weight).sum())
        share = float(((error @ moment) * error).sum()) / whole if whole else 0.0
        bias = None if part.bias is None else part.bias.data
        return LowRankLinear(down.to(weight.dtype), up.to(weight.dtype), bias), share
