"""A narrower residual stream: rotate it to its principal axes, fold the norms away, cut off the weakest axes.

Everything between layers is one vector per token, and RMSNorm does not notice a rotation of it. So all matrices that
read or write the stream can be turned to its principal axes on calibration text without changing the model, and the
axes that carry least are then deleted from every matrix at once. One rotation for all layers leaves an ordinary model
of smaller width that every engine runs. (The paper turns each layer's stream by itself, which keeps more but adds a
dense matrix to every residual connection, an operation no file format here knows.)

    parameters of the layers, the embedding and the head all fall to width kept / width

The last norm's gain is folded into the head, so a head shared with the embedding becomes a matrix of its own: that
costs vocabulary x width parameters, and a small model with a large vocabulary may weigh *more* after a thin slice. The
time per token falls all the same, as an embedding is only looked up. Small models use all of their width: on
SmolLM2-135M a tenth of the width removed cost a KL of 0.68 while the file grew by 8 %, and 28 %, for a file 13 %
smaller, 2.0 (`prune_width` at 10 %: 0.41). Of models without a tied head the whole of the slice is saved.

Source: SliceGPT (Ashkboos et al., arXiv 2401.15024).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from fivefold.errors import Misfit
from fivefold.model import Blueprint, Model, Trait, read_config
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search
from fivefold.techniques._shared.resized import (
    check_readable,
    completed,
    least,
    readable,
    resized,
    rounded,
    said,
    step_of,
)

WINDOW = 512


@dataclass(frozen=True, kw_only=True)
class SliceGpt(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.DENSE_WEIGHTS, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.FULL_WIDTH})
    lowers = {"compute": "direct", "memory": "direct", "energy": "direct", "money": "direct", "network": "direct"}
    may_raise = ("memory", "network")
    headline = "<=30% of parameters removed with >90% of zero-shot kept"
    perturbation = 3.6

    slice: Annotated[float, Range(0.0, 0.9), Search(0.1, 0.2, 0.3)] = 0.2
    """Share of the width of the residual stream removed; 0 only rotates."""
    windows: Annotated[int, Range(1, 4096), Fixed()] = 16
    """Calibration windows of 512 tokens."""

    def check(self, model: Model) -> None:
        from fivefold.techniques._shared.residual import check_residual

        check_residual(model, str(self))
        planned, step = self._planned(model), step_of(model)
        if self.slice and planned.width >= model.blueprint.width:
            raise Misfit(
                f"{self} removes nothing: a width of {model.blueprint.width} less {self.slice:.0%} is {planned.width}"
                f" in multiples of {step}; set slice to {least(model.blueprint.width, step):.2f} or more"
            )
        check_readable(model, planned, str(self))

    def _planned(self, model: Model) -> Blueprint:
        width = rounded(model.blueprint.width, self.slice, step_of(model))
        return readable(replace(model.blueprint, width=width, tied=False))

    def effort_once(self, model: Model) -> float:
        return 2.0 * self.windows * WINDOW * model.blueprint.parameters

    def effort(self, model: Model) -> float:
        return 2.0 * model.blueprint.width * model.blueprint.parameters

    def plan(self, model: Model) -> Model:
        return model.but(blueprint=self._planned(model))

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.calibration import windows
        from fivefold.techniques._shared.modules import rewritten, stored_tensors
        from fivefold.techniques._shared.residual import axes, turned
        from fivefold.training.module import load_module

        self.check(model)
        before, after = model.blueprint, self._planned(model)
        tokens = windows(model, self.windows, WINDOW)
        basis, shares = axes(load_module(model), tokens)
        config = read_config(model.path)
        tensors = completed(turned(stored_tensors(model), basis[:, : after.width]), config, after)
        eps = config.get("rms_norm_eps", 1e-6) * before.width / after.width
        done = rewritten(model, "slice_gpt", tensors, {**resized(config, after), "rms_norm_eps": eps})
        width = said(before.width, self.slice, after.width, step_of(model))
        own = ", the head a matrix of its own" if before.tied else ""
        return done.covered(
            f"slice_gpt: width {width}, {shares[: after.width].sum():.1%} of the signal kept on {tokens.size} tokens;"
            f" {1 - after.parameters / before.parameters:.1%} of all parameters removed{own}"
        )
