"""Pruning by weight times activation: zero the weights that contribute least to their output.

Output i of a linear layer is sum_j W_ij x_j, so removing W_ij costs about |W_ij| ||x_j|| with ||x_j|| the root mean
square of input j on calibration text. In every row the smallest of these go: a fraction `sparsity`, or two of every
four neighbours (2:4, the pattern sparse tensor cores compute at twice the rate). No weight is updated; layers are
pruned from the first to the last, each seeing the inputs its pruned predecessors really give. `magnitude` is the same
without ||x_j||, and is fooled by the few columns whose inputs are many times larger than the rest.

A zero still occupies its bits and its multiplication: by itself this makes no file smaller and no dense engine
faster. It pays with `sparse_storage` after it, and as damage that `repair` can heal. Small models tolerate little: half
the weights of a 135-million-parameter model is a lot. The memory is the model and one layer's activations.

Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search

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
    headline = "Llama-2-7B at 50%: perplexity 6.42 (dense 5.12, SparseGPT 6.51, magnitude 14.89)"
    perturbation = 3.0

    sparsity: Annotated[float, Range(0.0, 0.99), Search(0.3, 0.4, 0.5, 0.6)] = 0.5
    """Fraction of every row that becomes zero."""
    pattern: Literal["row", "2:4", "4:8"] = "row"
    """Where the zeros lie: anywhere in the row, or n of every m neighbours (then sparsity is 0.5)."""
    allocation: Literal["uniform", "owl"] = "uniform"
    """The same share in every layer, or less where more weights stand out (OWL; not for n of m)."""
    windows: Annotated[int, Range(1, 4096), Fixed()] = 8
    """Calibration windows of 512 tokens."""

    def __post_init__(self) -> None:
        from fivefold.techniques._shared.sparsity import check_share

        super().__post_init__()
        check_share("wanda", self.sparsity, self.pattern, "row", self.allocation)

    def check(self, model: Model) -> None:
        from fivefold.techniques._shared.sparsity import check_widths

        check_widths(self, model.blueprint, self.pattern, "row")

    def plan(self, model: Model) -> Model:
        return model.but(export=replace(model.export, density=1 - self.sparsity))

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.calibration import windows
        from fivefold.techniques._shared.zeros import pruned_model
        from fivefold.training.module import load_module

        module = load_module(model)
        parts = self.prune(module, windows(model, self.windows))
        return pruned_model(model, "wanda", module, parts)

    def prune(self, module: Any, tokens: NDArray[np.int64]) -> dict[str, Any]:
        """Zero weights of `module` in place, in passing over `tokens` (rows, length); name -> pruned linear layer.

        Before a decoder layer runs, a trial run of it collects the norms its own inputs give; it is pruned, then runs.
        """
        from fivefold.techniques._shared.importance import collecting
        from fivefold.techniques._shared.modules import forward, layers, linears
        from fivefold.techniques._shared.outliers import outlier_weighed

        shares = outlier_weighed(module, tokens, self.sparsity) if self.allocation == "owl" else {}
        parts = dict(linears(module))
        pruned: dict[str, Any] = {}

        def before(layer: Any, args: Any, kwargs: Any) -> None:
            inside = {id(part) for part in layer.modules()}
            own = {name: part for name, part in parts.items() if id(part) in inside}
            with collecting(own) as squares:
                layer.forward(*args, **kwargs)
            for name in squares.sums:
                self._cut(own[name], squares.mean(name).sqrt().float(), shares.get(name, self.sparsity))
                pruned[name] = own[name]

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers(module)]
        try:
            forward(module, tokens)
        finally:
            for handle in handles:
                handle.remove()
        return pruned

    def _cut(self, part: Any, norms: torch.Tensor, share: float) -> None:
        from fivefold.techniques._shared.modules import matrix
        from fivefold.techniques._shared.zeros import smallest_in_rows, smallest_of_groups

        weight = matrix(part)
        scores = weight.abs().float() * norms
        if self.pattern == "row":
            gone = smallest_in_rows(scores, int(weight.shape[1] * share))
        else:
            gone = smallest_of_groups(scores, self.pattern)
        weight.masked_fill_(gone, 0)
