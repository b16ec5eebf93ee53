"""Prefix tuning: keys and values in front of every text, learned for each layer; the model itself stays as it is.

    attention over [K_prefix; K_text], [V_prefix; V_text]        2 x tokens x key-value width numbers per layer

As if a prompt stood before the text whose inner states need not be those of any words. The numbers are about a
thousandth of the model's. They start as the keys and values the model computes for the first words of the training
examples, which is a prompt already (`start="text"`), or at random as in the first paper, which trains slower and less
surely (there, through a further network, which is thrown away afterwards; not done here).

The price: they cannot be merged. They lie beside the weights, only the torch engine applies them, techniques that
rewrite or export weights cannot follow, `tokens` places of the context and their cache are taken in every request, and
the tokens of a text stand `tokens` places later. Short prefixes learn little; adapters inside the layers learn more.

Held, saved and read back by `peft`. Sources: Li & Liang, arXiv 2101.00190; without the network, Liu et al., arXiv
2110.07602.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fivefold.errors import Misfit
from fivefold.model import Blueprint, Model, TrainPlan, Trait
from fivefold.space import Fixed, Range, Search
from fivefold.training.method import Adaptation, Lesson, Shapes

if TYPE_CHECKING:
    import torch

    from fivefold.training.delta import Delta


@dataclass(frozen=True, kw_only=True)
class Prefix(Adaptation):
    blocks = False
    breaks = Adaptation.breaks | {Trait.PLAIN_GRAPH}
    may_raise = ("quality", "compute", "memory")
    libraries = ("peft",)
    headline = "0.1% of parameters trained"
    perturbation = 2.0

    tokens: Annotated[int, Range(1, 4096, log=True), Search(8, 32)] = 16
    """Length of the prefix."""
    start: Annotated[Literal["text", "random"], Fixed()] = "text"
    """What it starts as."""
    rate: Annotated[float, Range(1e-7, 1.0, log=True), Fixed()] = 1e-2
    """Peak learning rate."""

    def check(self, model: Model) -> None:
        super().check(model)
        if self.tokens >= model.blueprint.context:
            raise Misfit(f"{self} leaves nothing of a context of {model.blueprint.context}; set tokens lower")

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate)

    def plan(self, model: Model) -> Model:
        left = max(1, model.blueprint.context - self.tokens)
        return super().plan(model).but(blueprint=replace(model.blueprint, context=left))

    def shapes(self, blueprint: Blueprint) -> Shapes:
        b = blueprint
        return {"prefix": (self.tokens, b.layers * 2 * b.kv_heads * b.head_dim)}

    def prepare(self, lesson: Lesson) -> dict[str, torch.nn.Parameter]:
        from fivefold.techniques._shared.prefixes import wrapped

        lesson.extra["wrapped"] = held = wrapped(lesson, self.tokens)
        return {"prefix": held.prompt_encoder["default"].embedding.weight}

    def hidden(self, lesson: Lesson) -> Callable[..., torch.Tensor]:
        from fivefold.techniques._shared.prefixes import hidden

        return hidden(lesson, lesson.extra["wrapped"])

    def ready(self, lesson: Lesson, loss: Callable[[Any], torch.Tensor], batches: Callable[[int], Any]) -> None:
        if self.start == "text":
            import numpy as np

            from fivefold.techniques._shared.prefixes import begin

            rows = [np.trim_zeros(row, "b").tolist() for batch, _ in batches(0) for row in batch.tokens]
            begin(lesson, lesson.extra["wrapped"], rows)

    def result(self, lesson: Lesson, value: Callable[[str], torch.Tensor]) -> Delta:
        from fivefold.techniques._shared.prefixes import files
        from fivefold.training.delta import Delta

        return Delta(files=files(lesson, value("prefix")), beside=True)
