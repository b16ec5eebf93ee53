"""Pruning by weight times activation: zero the weights that contribute least to their output.

Output i of a linear layer is sum_j W_ij x_j, so removing W_ij costs about |W_ij| ||x_j|| with ||x_j|| the root mean
square of input j on calibration text. In every row the smallest of these go: a fraction `sparsity`, or two of every
four neighbours (2:4, the pattern sparse tensor cores compute at twice the rate). No weight is updated; layers are
pruned from the first to the last, each seeing the inputs its pruned predecessors really give. Magnitude pruning is
the same without ||x_j||, and is fooled by the few columns whose inputs are a hundred times larger than the rest.

A zero still occupies its bits and its multiplication: by itself this makes no file smaller and no dense engine
faster. It pays where a runtime or a format skips zeros, and as damage that `repair` can heal. Small models tolerate
little: half the weights of a 135-million-parameter model is a lot. The memory is the model and one layer's
activations.

Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fivefold.errors import Misfit, RecipeError
from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Wanda(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.DENSE_WEIGHTS, Trait.UNFITTED,
                       Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.DENSE_WEIGHTS})
    lowers = {"compute": "indirect", "network": "indirect"}
    perturbation = 3.0

    sparsity: Annotated[float, Range(0.0, 0.95)] = 0.5
    """Fraction of every row that becomes zero."""
    pattern: Literal["row", "2:4", "4:8"] = "row"
    """Where the zeros lie: anywhere in the row, or n of every m neighbours (then sparsity is 0.5)."""
    windows: Annotated[int, Range(1, 4096), Fixed()] = 8
    """Calibration windows of 512 tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern != "row" and self.sparsity != 0.5:
            raise RecipeError(f"wanda: {self.pattern} zeroes exactly half; leave sparsity out or use pattern=\"row\"")

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.calibration import windows
        from fivefold.techniques._shared.modules import rewritten, stored_tensors
        from fivefold.training.module import load_module, stored_name

        module = load_module(model)
        pruned = self.prune(module, windows(model, self.windows))
        stored = stored_tensors(model)
        tensors: dict[str, Any] = dict(stored)
        zeros = weights = 0
        for name, part in pruned.items():
            place = stored_name(module, stored, f"{name}.weight")
            tensors[place] = part.weight.data.to(stored[place].torch().dtype)
            zeros += int((tensors[place] == 0).sum())
            weights += tensors[place].numel()
        said = f"wanda: {len(pruned)} linear layers, {zeros} of {weights} weights are 0; embedding and head kept"
        return rewritten(model, "wanda", tensors).covered(said)

    def prune(self, module: Any, tokens: NDArray[np.int64]) -> dict[str, Any]:
        """Zero weights of `module` in place, in one pass over `tokens` (rows, length); name -> pruned linear layer.

        Before a layer runs, a trial run of it collects the norms its own inputs give; it is pruned, and then runs.
        """
        from fivefold.techniques._shared.importance import collecting
        from fivefold.techniques._shared.modules import forward, layers, linears, matrix

        parts = dict(linears(module))

        def before(layer: Any, args: Any, kwargs: Any) -> None:
            inside = {id(part) for part in layer.modules()}
            own = {name: part for name, part in parts.items() if id(part) in inside}
            with collecting(own) as squares:
                layer.forward(*args, **kwargs)
            for name in squares.sums:
                weight = matrix(own[name])
                weight.masked_fill_(self.smallest(weight.abs().float() * squares.mean(name).sqrt().float()), 0)

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers(module)]
        try:
            forward(module, tokens)
        finally:
            for handle in handles:
                handle.remove()
        return parts

    def smallest(self, scores: torch.Tensor) -> torch.Tensor:
        """True where a weight goes; `scores` is (rows, columns)."""
        import torch

        rows, columns = scores.shape
        if self.pattern == "row":
            grouped, gone = scores, int(columns * self.sparsity)
        else:
            gone, size = map(int, self.pattern.split(":"))
            if columns % size:
                raise Misfit(f"{self} needs rows of a multiple of {size}, not {columns}; use pattern=\"row\"")
            grouped = scores.reshape(-1, size)
        mask = torch.zeros_like(grouped, dtype=torch.bool)
        mask.scatter_(1, grouped.argsort(dim=1, stable=True)[:, :gone], True)
        return mask.reshape(rows, columns)
