"""Leaving zeros out of the file and of the products: what makes pruning pay in the torch engine.

After a technique that zeroes weights, every linear layer is stored as a bit per weight and its nonzero weights in
bfloat16, 2 (1 - sparsity) + 1/8 bytes per weight: 1.125 at one half, where a dense bfloat16 matrix takes 2 and a
float32 one 4. A token then reads that much less, and decoding, which is bound by reading, gets faster in proportion,
by a kernel that spreads 32 weights at a time to their columns (AVX-512 VBMI2; without it only memory is saved, and a
C++ compiler is needed once in any case). Nothing is lost but the rounding to bfloat16. A layer that would grow, because
less than 1/16 of it is zero, stays as it is.

Long prompts and large batches are arithmetic: the matrix is unpacked for them, so they gain nothing. The token
embedding and the head are not pruned and stay.

8 bits of every weight take less than 16 of every second one, so `int8` is the smaller file: this is for models that
stand more pruning, and for the zeros that `repair` keeps.

Source: bit masks with packed values, as in compressed-tensors' "sparse-bitmask" format (vllm-project); Sun et al.,
arXiv 2306.11695, for the zeros it stores.
"""

from __future__ import annotations

from dataclasses import dataclass

from fivefold.errors import Misfit
from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.techniques._shared.packing import linear_shapes


@dataclass(frozen=True, kw_only=True)
class SparseStorage(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.FLOAT_WEIGHTS, Trait.TRAINABLE})
    lowers = {"memory": "direct", "network": "direct", "compute": "direct", "energy": "indirect", "money": "indirect"}
    may_raise = ("compute",)
    perturbation = 4.0

    def check(self, model: Model) -> None:
        from fivefold.engines._native import available
        from fivefold.techniques._shared.bitmask import looks_pruned

        shapes, _ = linear_shapes(model, self.name)
        if Trait.DENSE_WEIGHTS in model.traits and not looks_pruned(model, shapes):
            raise Misfit(
                f"{self.name} has no zeros to leave out: no technique before it prunes single weights; add one, such as"
                " wanda or sparsegpt, or remove sparse_storage"
            )
        if why := available("sparse"):
            raise Misfit(f"{self.name}: {why}")

    def plan(self, model: Model) -> Model:
        return model.but(export=model.export.storing(16 * model.export.density + 1))

    def effort_once(self, model: Model) -> float:
        return 0.0

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.bitmask import sparse_layers, stored_sparsely

        shapes, _ = linear_shapes(model, self.name)
        chosen, zeros = sparse_layers(model, shapes)
        if not chosen:
            raise Misfit(
                f"{self.name} saves nothing: only {zeros:.1%} of the weights are zero, and a bit per weight costs 1/16;"
                " prune more or remove sparse_storage"
            )
        return stored_sparsely(model, chosen).covered(
            f"sparse_storage: {len(chosen)} of {len(shapes)} linear layers, {zeros:.1%} of all their weights left out;"
            " embedding and head kept"
        )
