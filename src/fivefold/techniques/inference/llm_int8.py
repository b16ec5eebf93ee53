"""Weights and activations in 8 bits, but the few input columns with large values in 16 bits beside.

Rounding x to 8 bits with one scale per token spends its 254 steps on the largest value. In language models a few
columns of x are tens of times larger than the rest, and everything else would be rounded to almost nothing. So

    y_i = a s_i sum_{j in} p_j q_ij  +  sum_{j out} x_j w_ij        out: columns with |x_j| > threshold

with a = max_{j in} |x_j| / 127 per token and s_i = max_{j in} |w_ij| / 127 per row (vector-wise scales). The first sum
is whole-number arithmetic, at twice the rate of bfloat16 where the processor has VNNI; the second is in floating point.
"calibrated" finds the columns once, on calibration text, and keeps their own weights in bfloat16; "runtime" looks at
every token and multiplies its large inputs by the 8-bit weights, which needs no calibration and no memory.

A weight takes 1 byte and 4 / columns, and 2 bytes more for a column that lies out. Lowers memory and the time of
prompts and of single tokens in the torch engine. With threshold 0 no activation is rounded; with a threshold that
nothing exceeds this is plain 8 bits, `smooth_quant` without smoothing. A low threshold puts so much beside that the
speed is gone.

Source: LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale (Dettmers et al., arXiv 2208.07339), where
columns are found at run time for a batch together; here for each token, so that an answer does not depend on others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LlmInt8(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.FLOAT_WEIGHTS, Trait.TRAINABLE})
    lowers = {"memory": "direct", "network": "direct", "compute": "direct", "energy": "indirect", "money": "indirect"}
    perturbation = 4.2

    threshold: Annotated[float, Range(0.0, 1e6), Search(6.0, 20.0, 1e6)] = 6.0
    """Inputs of greater magnitude are multiplied in 16 bits; 1e6 leaves none."""
    columns: Annotated[Literal["calibrated", "runtime"], Fixed()] = "calibrated"
    """Where large inputs are found: in whole columns on calibration text, or in every token while it runs."""
    head: Literal["keep", "int8"] = "keep"
    """The token embedding and the output head: as they are, or in 8 bits too."""
    windows: Annotated[int, Range(1, 4096), Fixed()] = 8
    """Calibration windows of 512 tokens."""

    def check(self, model: Model) -> None:
        from fivefold.techniques._shared.packing import linear_shapes

        linear_shapes(model, str(self))

    def effort_once(self, model: Model) -> float:
        return super().effort_once(model) if self.columns == "calibrated" else 0.0

    def plan(self, model: Model) -> Model:
        return model.but(export=model.export.storing(8.0, self.head))

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.eight_bits import stored
        from fivefold.techniques._shared.packing import linear_shapes

        shapes, head = linear_shapes(model, str(self))
        chosen = [*shapes, *(head if self.head == "int8" else [])]
        rest = "embedding and head in 8 bits" if self.head == "int8" else "embedding and head kept"
        said = f"llm_int8: {len(shapes)} of {len(shapes)} linear layers"
        if self.columns == "runtime":
            done = stored(model, "llm_int8", chosen, limit=self.threshold)
            return done.covered(f"{said}, inputs above {self.threshold:g} in 16 bits as they come; {rest}")
        beside = self.beside(model)
        done = stored(model, "llm_int8", chosen, beside={name: beside[name] for name in shapes})
        out, of = sum(len(beside[name]) for name in shapes), sum(columns for _, columns in shapes.values())
        return done.covered(f"{said}, {out} of {of} columns exceed {self.threshold:g} and stay in 16 bits; {rest}")

    def beside(self, model: Model) -> dict[str, Tensor]:
        """Linear layer, by its name on disk -> columns whose inputs exceed the threshold on calibration text."""
        from fivefold.techniques._shared.calibration import windows
        from fivefold.techniques._shared.eight_bits import input_peaks
        from fivefold.techniques._shared.modules import stored_tensors
        from fivefold.training.module import load_module, stored_name

        module, names = load_module(model), stored_tensors(model)
        return {
            stored_name(module, names, f"{name}.weight").removesuffix(".weight"):
                (peaks > self.threshold).nonzero()[:, 0]
            for name, peaks in input_peaks(module, windows(model, self.windows)).items()
        }
