"""Pruning with reconstruction: what the removed weights gave, the remaining ones of the row make up for.

For every linear layer the inputs of calibration text give H = mean(x x^T). Going through the columns, the weights with
the smallest error w_j^2 / [H^-1]_jj of every block of 128 columns (H over the columns still free) become zero, and the
columns after them move to cancel the error, as the least-squares problem of the layer asks (see `_shared/surgeon`).
Layers are treated in the order in which they compute, each on the inputs its treated predecessors really give.
Afterwards `refine` steps of conjugate gradients let the columns before a removed weight help too.

It loses far less than magnitude, and less than `wanda` where the pattern is tight (2:4) or much is removed. It costs a
Cholesky factor per matrix and a sweep over its columns. What it fits is the calibration text: with few windows and wide
layers the weights learn its noise, which `damp` holds down.

A zero still occupies its bits and its multiplication: alone it makes no file smaller and no dense engine faster;
`sparse_storage` after it does both. The memory is the model, one layer's activations and columns^2 numbers.

Source: Frantar and Alistarh, SparseGPT, arXiv 2301.00774.
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
class SparseGPT(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.DENSE_WEIGHTS, Trait.UNFITTED,
                       Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.DENSE_WEIGHTS})
    lowers = {"compute": "indirect", "network": "indirect"}
    headline = "OPT-175B and BLOOM at 50-60% in one shot, <4.5 h, negligible perplexity loss"
    perturbation = 3.0

    sparsity: Annotated[float, Range(0.0, 0.99), Search(0.3, 0.4, 0.5, 0.6)] = 0.5
    """Fraction of every matrix that becomes zero."""
    pattern: Literal["block", "2:4", "4:8"] = "block"
    """Where the zeros lie: anywhere in a block of 128 columns, or n of every m neighbours (then sparsity is 0.5)."""
    allocation: Literal["uniform", "owl"] = "uniform"
    """The same share in every layer, or less where more weights stand out (OWL; not for n of m)."""
    refine: Annotated[int, Range(0, 1000), Fixed()] = 10
    """Steps of conjugate gradients that fit the remaining weights once more; 0 is the published method."""
    damp: Annotated[float, Range(1e-6, 10.0, log=True), Fixed()] = 0.01
    """Added to the diagonal of H, as a share of its mean: how little the calibration text is trusted."""
    windows: Annotated[int, Range(1, 4096), Fixed()] = 8
    """Calibration windows of 512 tokens."""

    def __post_init__(self) -> None:
        from fivefold.techniques._shared.sparsity import check_share

        super().__post_init__()
        check_share("sparsegpt", self.sparsity, self.pattern, "block", self.allocation)

    def check(self, model: Model) -> None:
        from fivefold.techniques._shared.sparsity import check_widths

        check_widths(self, model.blueprint, self.pattern, "block")

    def plan(self, model: Model) -> Model:
        return model.but(export=replace(model.export, density=1 - self.sparsity))

    def effort(self, model: Model) -> float:
        b, tokens = model.blueprint, 512 * self.windows
        inputs = (b.width, b.heads * b.head_dim, b.width, b.ffn)
        shared = sum(2.0 * tokens * c**2 + 4.0 * c**3 for c in inputs)
        cells = b.matrix_parameters / b.layers - b.vocab * b.width / b.layers
        return b.layers * (shared + (3.0 + 2.0 * self.refine) * cells * max(b.width, b.ffn))

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.calibration import windows
        from fivefold.techniques._shared.zeros import pruned_model
        from fivefold.training.module import load_module

        module = load_module(model)
        parts = self.prune(module, windows(model, self.windows))
        return pruned_model(model, "sparsegpt", module, parts)

    def prune(self, module: Any, tokens: NDArray[np.int64]) -> dict[str, Any]:
        """Change weights of `module` in place, in passing over `tokens` (rows, length); name -> linear layer."""
        from fivefold.techniques._shared.modules import matrix
        from fivefold.techniques._shared.outliers import outlier_weighed
        from fivefold.techniques._shared.passing import JointSquares, treat_in_passing
        from fivefold.techniques._shared.surgeon import sparse_solution

        squares = JointSquares()
        shares = outlier_weighed(module, tokens, self.sparsity) if self.allocation == "owl" else {}

        def treat(name: str, part: Any, inputs: torch.Tensor) -> None:
            weight, hessian = matrix(part), squares.of(inputs)
            share = shares.get(name, self.sparsity)
            weight.copy_(sparse_solution(weight, hessian, share, self.pattern, damp=self.damp, refine=self.refine))

        return treat_in_passing(module, tokens, treat)
