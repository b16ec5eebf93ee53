"""Weights and activations in 8 bits, after moving the activations' large columns into the weights.

Activations are hard to round, because a few of their columns are tens of times larger than the rest and share one scale
with them; weights are easy. Scaling column j of x down and of W up changes nothing in W x, and evens out the two:

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)        W x = (W diag(s)) (diag(1/s) x)

alpha 1 gives every column of x the same largest value, alpha 0 every column of W. 1/s is folded into what gives x: the
gain of the norm before (which all its linear layers share), the rows of up_proj for down_proj, the rows of v_proj for
o_proj. Then weights are rounded with a scale per row, and activations, while it runs, with a scale per token. With
`spread` every fold tries alphas around the given one (and no smoothing) and takes the one whose rounded outputs are
nearest to the parent's on calibration text.

A weight takes 1 byte and 4 / columns. The torch engine multiplies whole numbers, at twice the rate of bfloat16 where
the processor has VNNI, so prompts gain as well as single tokens. What stays: attention itself, embedding and head (the
latter by choice). It helps little where no column stands out, and where nothing linear comes before a layer.

Source: SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models (Xiao et al., arXiv
2211.10438).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fivefold.errors import Misfit
from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from fivefold.techniques._shared.smoothing import Fold

TRIED = 11
UNCHANGED = 1e-3


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.FLOAT_WEIGHTS, Trait.TRAINABLE})
    lowers = {"memory": "direct", "network": "direct", "compute": "direct", "energy": "indirect", "money": "indirect"}
    headline = "1.56x faster, 2x less memory; Llama-2-7B W8A8 at alpha .85: perplexity 5.474 -> 5.515"
    perturbation = 4.1

    alpha: Annotated[float, Range(0.0, 1.0), Search(0.5, 0.8)] = 0.5
    """Share of the range that moves from activations to weights."""
    spread: Annotated[float, Range(0.0, 1.0), Search(0.0, 0.5)] = 0.5
    """Every fold takes the best alpha within this of the given one; 0 uses the given one everywhere."""
    folds: Annotated[Literal["all", "norms"], Fixed()] = "all"
    """What scales are folded into: norms, up_proj and v_proj, or norms alone."""
    head: Literal["keep", "int8"] = "keep"
    """The token embedding and the output head: as they are, or in 8 bits too."""
    windows: Annotated[int, Range(1, 4096), Fixed()] = 8
    """Calibration windows of 512 tokens."""

    def check(self, model: Model) -> None:
        from fivefold.techniques._shared.packing import linear_shapes

        linear_shapes(model, str(self))

    def plan(self, model: Model) -> Model:
        return model.but(export=model.export.storing(8.0, self.head))

    def effort(self, model: Model) -> float:
        """Every layer runs a second time to be looked at, and alphas are tried on a sample."""
        return 2.0 * model.blueprint.parameters * (512 * self.windows + (256 * TRIED if self.spread else 0))

    def apply(self, model: Model) -> Model:
        import shutil

        from fivefold.techniques._shared.eight_bits import stored
        from fivefold.techniques._shared.packing import linear_shapes

        shapes, head = linear_shapes(model, str(self))
        float_folder, smoothed, alphas = self._smoothed(model)
        chosen = [*shapes, *(head if self.head == "int8" else [])]
        done = stored(model, "smooth_quant", chosen, source=float_folder)
        shutil.rmtree(float_folder)
        rest = "in 8 bits" if self.head == "int8" else "kept"
        which = f"alpha {min(alphas):g} to {max(alphas):g}" if alphas else "no alpha was better than none"
        return done.covered(
            f"smooth_quant: {len(shapes)} of {len(shapes)} linear layers, {smoothed} of them smoothed ({which});"
            f" embedding and head {rest}"
        )

    def _smoothed(self, model: Model) -> tuple[Path, int, list[float]]:
        """A float folder with the scales folded in, how many linear layers they reached, and the alphas."""
        from fivefold.techniques._shared.calibration import windows
        from fivefold.techniques._shared.modules import rewritten, stored_tensors
        from fivefold.training.module import load_module, stored_name

        module = load_module(model).float()
        alphas = self.smooth(module, windows(model, self.windows), model.blueprint.family)
        names = stored_tensors(model)
        tensors: dict[str, Any] = dict(names)
        for fold in alphas:
            for part in (fold.source, *fold.readers.values()):
                own = next(name for name, other in module.named_modules() if other is part)
                for leaf, value in part.named_parameters(recurse=False):
                    tensors[stored_name(module, names, f"{own}.{leaf}")] = value.data
        reached = {name for fold, alpha in alphas.items() if alpha is not None for name in fold.readers}
        return rewritten(model, "smoothed", tensors).path, len(reached), [a for a in alphas.values() if a is not None]

    def smooth(self, module: Any, tokens: Any, family: str) -> dict[Fold, float | None]:
        """Fold scales into a float32 `module` in place; every fold with its alpha, None for no smoothing.

        Raises Misfit when nothing can be folded, or when the model then answers differently.
        """
        from fivefold.techniques._shared.modules import forward
        from fivefold.techniques._shared.smoothing import difference, smooth

        alphas: dict[Fold, float | None] = {}

        def choose(fold: Fold) -> Tensor:
            alphas[fold], scale = self._best(fold)
            return scale

        start = tokens[:1, :64]
        before = forward(module, start).float()
        smooth(module, tokens, choose, pairs=self.folds == "all")
        if not alphas:
            raise Misfit(f"{self} finds nothing to fold scales into in a model of {family}; use llm_int8 instead")
        if not difference(module, start, before) < UNCHANGED:
            raise Misfit(
                f"{self} cannot fold scales into a model of {family}: more than linear layers read its norms;"
                " use llm_int8 instead"
            )
        return alphas

    def _best(self, fold: Fold) -> tuple[float | None, Tensor]:
        import torch

        if not self.spread:
            return self.alpha, fold.scale(self.alpha)
        tried = {round(min(1.0, max(0.0, self.alpha + self.spread * (2 * i / (TRIED - 1) - 1))), 6)
                 for i in range(TRIED)}
        scales: dict[float | None, Tensor] = {None: torch.ones(fold.inputs.shape[1])}
        scales |= {alpha: fold.scale(alpha) for alpha in sorted(tried)}
        best = min(scales, key=lambda alpha: lost(fold, scales[alpha]))
        return best, scales[best]


def lost(fold: Fold, scale: Tensor) -> float:
    """Squared error of the readers' outputs when inputs / scale and weights x scale are in 8 bits.

    Relative to the size of each token's output, summed over the sample: no single token decides.
    """
    from fivefold.engines._layers.int8_activations import rounded

    x, error = rounded(fold.inputs / scale), 0.0
    for weight in fold.matrices():
        want = fold.inputs @ weight.T
        off = (x @ rounded(weight * scale).T - want).square().sum(1)
        error += float((off / want.square().sum(1).clamp_min(1e-12)).sum())
    return error
