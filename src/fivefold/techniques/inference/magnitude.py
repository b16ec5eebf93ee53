"""Pruning by magnitude: zero the smallest weights of every matrix.

The plainest rule: of the weights of a linear layer the fraction `sparsity` with the smallest |W_ij| become zero,
compared over the whole matrix (or two of every four neighbours, 2:4). No calibration text, no update of the weights
that stay; it takes seconds and no more memory than the model.

It takes a small weight for an unimportant one. In language models a few input columns carry values many times larger
than the rest, and small weights on them matter more than large ones elsewhere: at half the weights `wanda`, which
weighs by the input, and `sparsegpt`, which also moves the others, lose far less. It is the baseline they are judged by,
and what is left to do when there is no text.

A zero still occupies its bits and its multiplication: alone it makes no file smaller and no dense engine faster;
`sparse_storage` after it does both, and `repair` can heal part of the damage.

Sources: Han et al., Learning both Weights and Connections, arXiv 1506.02626; as the baseline of Sun et al., arXiv
2306.11695.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Range, Search


@dataclass(frozen=True, kw_only=True)
class Magnitude(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.DENSE_WEIGHTS, Trait.UNFITTED,
                       Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.DENSE_WEIGHTS})
    lowers = {"compute": "indirect", "network": "indirect"}
    headline = "Llama-2-7B/13B/70B at 50%: perplexity 14.89/6.37/4.98 (dense 5.12/4.57/3.12)"
    perturbation = 3.0

    sparsity: Annotated[float, Range(0.0, 0.99), Search(0.2, 0.3, 0.4, 0.5)] = 0.5
    """Fraction of every matrix that becomes zero."""
    pattern: Literal["matrix", "2:4", "4:8"] = "matrix"
    """Where the zeros lie: anywhere in the matrix, or n of every m neighbours (then sparsity is 0.5)."""

    def __post_init__(self) -> None:
        from fivefold.techniques._shared.sparsity import check_share

        super().__post_init__()
        check_share("magnitude", self.sparsity, self.pattern, "matrix")

    def check(self, model: Model) -> None:
        from fivefold.techniques._shared.sparsity import check_widths

        check_widths(self, model.blueprint, self.pattern, "matrix")

    def plan(self, model: Model) -> Model:
        return model.but(export=replace(model.export, density=1 - self.sparsity))

    def effort_once(self, model: Model) -> float:
        return 0.0

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.modules import linears, matrix
        from fivefold.techniques._shared.zeros import pruned_model, smallest, smallest_of_groups
        from fivefold.training.module import load_module

        module = load_module(model)
        parts = dict(linears(module))
        for part in parts.values():
            weight = matrix(part)
            if self.pattern == "matrix":
                gone = smallest(weight.abs().float(), int(weight.numel() * self.sparsity))
            else:
                gone = smallest_of_groups(weight.abs().float(), self.pattern)
            weight.masked_fill_(gone, 0)
        return pruned_model(model, "magnitude", module, parts)
