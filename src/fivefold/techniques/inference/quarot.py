"""A random rotation of the residual stream and of every head's values: outliers are spread before rounding.

A block of weights shares one scale, set by its largest weight; an outlier makes the steps of all its neighbours coarse.
A model's function does not change when its residual stream is turned by an orthogonal Q and the matrices around it by
Q^T (`_shared/rotation` has the algebra): norm gains are first folded into the matrices that read them, then embedding,
readers, writers and head are turned; inside attention v_proj and o_proj are turned head by head. Q is a Hadamard matrix
with random signs, Q_ij = +-1 / sqrt(n), so every new weight is a sum over all old ones and its distribution nearly
normal: kurtosis falls to about 3. Logits stay those of the parent but for float rounding.

Only what can be folded is done: QuaRot also rotates online, before down_proj and after the rotary positions, which
quantized activations and caches need; the graphs of llama.cpp and transformers have no such step.

It pays before `int4`, `gptq` or low-bit types on models with outliers. It does not where weights already look normal;
and a head tied to the embedding, with a last norm whose gain is not one number, must become a matrix of its own, whose
bytes may cost more than the rotation saves: `residual=False` then turns values and outputs only and unties nothing.

Source: Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, arXiv 2404.00456.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range


@dataclass(frozen=True, kw_only=True)
class Quarot(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.DENSE_WEIGHTS, Trait.TORCH_GRAPH, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    lowers = {"memory": "indirect"}
    may_raise = ("memory", "network", "compute")
    headline = "70B in 4 bits end to end, cache included: <=0.29 perplexity lost, 99% of zero-shot kept"
    perturbation = 0.4

    residual: bool = True
    """Turn the residual stream too; False: only values and outputs of attention heads, which unties nothing."""
    seed: Annotated[int, Range(0, 1 << 30), Fixed()] = 0
    """Of the random signs."""

    def check(self, model: Model) -> None:
        from fivefold.techniques._shared.rotation import check

        check(model, self.name)

    def effort_once(self, model: Model) -> float:
        return 0.0

    def effort(self, model: Model) -> float:
        return 2.0 * model.blueprint.parameters * model.blueprint.width

    def plan(self, model: Model) -> Model:
        from fivefold.techniques._shared.rotation import unties

        untied = self.residual and unties(model)
        return model.but(blueprint=replace(model.blueprint, tied=model.blueprint.tied and not untied))

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.rotation import built, fold, random_start, said

        blueprint = model.blueprint
        done, changed = fold(model, self.name, random_start(blueprint, self.seed, residual=self.residual))
        how = f"residual stream by {built(blueprint.width)}, " if self.residual else ""
        return done.covered(f"quarot: {how}heads by {built(blueprint.head_dim)}; {said(model, done, changed)}")
