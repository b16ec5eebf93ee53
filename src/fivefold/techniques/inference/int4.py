"""Weights of linear layers in 4 bits for the torch engine; activations stay in floating point.

A row is cut into groups of `group` neighbours, each with its own scale s and offset z: w' = s (q - 8) + z with q of 0
to 15 and s = (max - min) / 15. The error is at most s / 2 per weight; smaller groups have narrower ranges and smaller
errors, and cost more: a weight takes 0.5 + 4 / group bytes, 4.5 bits at group 64 and 5 at 32.

Lowers memory, file and, where reading weights is the bottleneck, time per token of the torch engine. Long prompts are
arithmetic and gain nothing. Plain rounding to 4 bits costs small models much; `repair` cannot follow it, because the
weights are no longer floating point. On a CPU llama.cpp's types are usually better for the same bytes.

Source: GPTQ, arXiv 2210.17323, for groups and as the rounding to compare with; kernels: PyTorch's weight-only int4
product.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Literal

from fivefold.errors import Misfit
from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed
from fivefold.techniques._shared.packing import Layers, Shapes, linear_shapes, packed


@dataclass(frozen=True, kw_only=True)
class Int4(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.FLOAT_WEIGHTS, Trait.TRAINABLE})
    lowers = {"memory": "direct", "network": "direct", "compute": "indirect", "energy": "indirect", "money": "indirect"}
    may_raise = ("compute",)
    perturbation = 5.0

    group: Literal[32, 64, 128, 256] = 64
    """Neighbouring weights that share a scale."""
    head: Literal["keep", "int8"] = "keep"
    """The token embedding and the output head: as they are, or in 8 bits."""
    fallback: Annotated[Literal["refuse", "keep", "int8"], Fixed()] = "refuse"
    """What becomes of layers whose width is not a multiple of the group; "refuse" stops before any work."""

    def check(self, model: Model) -> None:
        self._chosen(model)

    def plan(self, model: Model) -> Model:
        return model.but(export=model.export.storing(4 + 32 / self.group, self.head))

    def apply(self, model: Model) -> Model:
        chosen, head, shapes, misfits = self._chosen(model)
        said = f"int4: {len(shapes) - len(misfits)} of {len(shapes)} linear layers in groups of {self.group}"
        if misfits:
            how = "kept" if self.fallback == "keep" else "in 8 bits"
            widths = ", ".join(str(w) for w in sorted({shapes[name][1] for name in misfits}))
            said += f"; {len(misfits)} {how} because rows of {widths} do not fit"
        said += "; embedding and head kept" if self.head == "keep" else "; embedding and head in 8 bits"
        return packed(model, "int4", {**chosen, **dict.fromkeys(head, (8, 0))}).covered(said)

    def _chosen(self, model: Model) -> tuple[Layers, list[str], Shapes, list[str]]:
        """What to pack (module -> bits, group), head modules to pack, all linear layers, and those that do not fit."""
        from fivefold.engines._layers.packed import packable

        shapes, head = linear_shapes(model, str(self))
        misfits = [name for name, shape in shapes.items() if not packable(*shape, 4, self.group)]
        if misfits and self.fallback == "refuse":
            (rows, columns), count = Counter(shapes[name] for name in misfits).most_common(1)[0]
            options = [g for g in (128, 64, 32) if all(packable(*shapes[n], 4, g) for n in misfits)]
            repair = f"choose group={options[0]}" if options else 'give fallback="int8"'
            raise Misfit(
                f"{self} does not fit {len(misfits)} of {len(shapes)} linear layers, {count} are {rows} x {columns}:"
                f" columns must be a multiple of {self.group} and rows of 16; {repair}"
            )
        chosen: Layers = {name: (4, self.group) for name in shapes if name not in misfits}
        if self.fallback == "int8":
            chosen |= dict.fromkeys(misfits, (8, 0))
        return chosen, head if self.head == "int8" else [], shapes, misfits
