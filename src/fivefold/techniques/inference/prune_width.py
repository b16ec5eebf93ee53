"""Narrower layers: feed-forward channels and key-value heads that matter least go, together with all that reads them.

A feed-forward channel is a row of gate and up and a column of down; a key-value group is a head of k and v with its
query heads' rows of q and columns of o. Removing such a group whole leaves an ordinary smaller matrix, so memory, file,
arithmetic and (for groups) the key-value cache fall in every engine, in proportion:

    parameters removed = layers x width x (3 x channels removed + (2 + 2 x queries per group) x head_dim x groups)

Every layer loses the same number, so the config stays plain. Which go is decided per layer on calibration text: by the
mean square of the first-order change of the loss, h dL/dh ("taylor"), or of what the group adds to the residual stream
("activation"). The kept channels are rounded to a multiple of 32, the block of GGUF rows.

The embedding, the head and the residual width stay: a small model with a large vocabulary shrinks less than its layers.
Nothing makes up for the loss here; `repair` after it does. On SmolLM2-135M, 9.9 % of all parameters as channels cost a
KL of 0.41 by taylor and 0.47 by activation, 19.7 % 1.19 and 1.04: to first order is far from true for a third of the
channels at once. One of its three key-value heads and a few channels, 10.3 %, cost 0.85.

Sources: LLM-Pruner (Ma et al., arXiv 2305.11627); Minitron (Muralidharan et al., arXiv 2407.14679) for activations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from fivefold.errors import Misfit
from fivefold.model import Blueprint, Model, Trait, read_config
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search
from fivefold.techniques._shared.groups import WINDOW, Kept, check_groups, cut, importances, keep
from fivefold.techniques._shared.resized import (
    BLOCK,
    check_readable,
    completed,
    least,
    readable,
    resized,
    rounded,
    said,
)


@dataclass(frozen=True, kw_only=True)
class PruneWidth(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.DENSE_WEIGHTS, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.FULL_WIDTH})
    lowers = {"compute": "direct", "memory": "direct", "energy": "direct", "money": "direct", "network": "direct"}
    headline = "LLM-Pruner: recovered by LoRA in 3 hours on 50K samples"
    perturbation = 3.2

    channels: Annotated[float, Range(0.0, 0.95), Search(0.0, 0.1, 0.2, 0.3)] = 0.2
    """Share of each layer's feed-forward channels removed."""
    groups: Annotated[int, Range(0, 1024), Search(0, 1)] = 0
    """Key-value heads removed from each layer, with their query heads."""
    importance: Literal["taylor", "activation"] = "taylor"
    """What decides which go: how much the loss changes to first order, or the size of what they add."""
    windows: Annotated[int, Range(1, 4096), Fixed()] = 16
    """Calibration windows of 256 tokens."""

    def check(self, model: Model) -> None:
        if not self.channels and not self.groups:
            raise Misfit("prune_width removes nothing; set channels above 0 or groups to 1 or more")
        blueprint, planned = model.blueprint, self._planned(model.blueprint)
        if self.channels:
            check_groups(model, str(self), "channels")
        if self.groups:
            check_groups(model, str(self), "groups")
        if self.groups >= blueprint.kv_heads:
            raise Misfit(
                f"{self} leaves no key-value head of {blueprint.kv_heads}; set groups to {blueprint.kv_heads - 1} or"
                " less"
            )
        if self.channels and planned.ffn >= blueprint.ffn:
            raise Misfit(
                f"{self} removes nothing: {blueprint.ffn} channels less {self.channels:.0%} is {planned.ffn} in"
                f" multiples of {BLOCK}; set channels to {least(blueprint.ffn):.2f} or more"
            )
        if self.groups and planned.heads * planned.head_dim % BLOCK:
            raise Misfit(
                f"{self} leaves {planned.heads} heads of {planned.head_dim}, rows of {planned.heads * planned.head_dim}"
                f" which no block of {BLOCK} divides; choose another number of groups"
            )
        check_readable(model, planned, str(self))

    def _planned(self, blueprint: Blueprint) -> Blueprint:
        kept = max(1, blueprint.kv_heads - self.groups)
        return readable(replace(
            blueprint, ffn=rounded(blueprint.ffn, self.channels), kv_heads=kept,
            heads=blueprint.heads // blueprint.kv_heads * kept,
        ))

    def effort_once(self, model: Model) -> float:
        return (4.0 if self.importance == "taylor" else 2.0) * self.windows * WINDOW * model.blueprint.parameters

    def plan(self, model: Model) -> Model:
        return model.but(blueprint=self._planned(model.blueprint))

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.calibration import windows
        from fivefold.techniques._shared.modules import rewritten, stored_tensors
        from fivefold.training.module import load_module

        self.check(model)
        before, after = model.blueprint, self._planned(model.blueprint)
        module = load_module(model)
        tokens = windows(model, self.windows, WINDOW)
        kept = [
            Kept(keep(channels, after.ffn), keep(groups, after.kv_heads))
            for channels, groups in importances(module, tokens, self.importance, before.kv_heads)
        ]
        del module
        config = read_config(model.path)
        tensors = completed(cut(stored_tensors(model), kept, before), config, after)
        done = rewritten(model, "prune_width", tensors, resized(config, after))
        gone = 1 - after.parameters / before.parameters
        return done.covered(
            f"prune_width: {before.layers} layers, feed-forward channels {said(before.ffn, self.channels, after.ffn)},"
            f" key-value heads {before.kv_heads} -> {after.kv_heads}; {gone:.1%} of all parameters removed, by"
            f" {self.importance} on {tokens.size} tokens"
        )
