"""BitFit: only the biases are trained, about one number in a thousand; every matrix stays as it is.

    y = x W' + b        b is trained, W is not

A layer's gradient and optimiser state shrink from its matrix to its bias, and the backward pass skips the weights' own
gradients: two thirds of the arithmetic of full fine-tuning. What is shipped is the biases, 4 bytes each; the model
served is the same size and as fast as before.

What "bias" means here: every vector named bias, those of linear layers and of layer norms (GPT-2, Qwen2's queries, keys
and values). A model that has none, such as Llama, has only the gains of its norms as vectors. There these are trained
instead, x -> g * x / rms(x): a scale per channel and not a shift. That is in the spirit of the method and not what
the paper measured; the coverage says which of the two was done.

It does not help when much is to be learned: a bias cannot make new features, only weigh and shift those that are there.

Source: Ben Zaken et al., arXiv 2106.10199.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

from fivefold.errors import Misfit
from fivefold.model import Blueprint, Model, TrainPlan
from fivefold.space import Fixed, Range
from fivefold.training.method import Adaptation, Lesson, Shapes, model_shapes

if TYPE_CHECKING:
    import torch

    from fivefold.training.delta import Delta


@dataclass(frozen=True, kw_only=True)
class BitFit(Adaptation):
    whole = True
    headline = "~0.08-0.1% of parameters trained, competitive on small and mid-sized data"
    perturbation = 1.0

    rate: Annotated[float, Range(1e-7, 1e-1, log=True), Fixed()] = 1e-3
    """Peak learning rate: far above that of full fine-tuning, as so few numbers have to do it all."""

    def check(self, model: Model) -> None:
        from fivefold.weights import read_tensors

        super().check(model)
        if model.format == "safetensors" and not _vectors({n: t.shape for n, t in read_tensors(model.path)}):
            raise Misfit(f"{self.name} trains biases, and {model.name} has neither biases nor norm gains; use lora")

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate)

    def shapes(self, blueprint: Blueprint) -> Shapes:
        """Families not named here are taken to have no biases; where they do, the formula leaves them out."""
        b = blueprint
        heads, keys = b.heads * b.head_dim, b.kv_heads * b.head_dim
        layers = {"qwen2": (heads, keys, keys),
                  "gpt2": (heads, keys, keys, b.width, b.ffn, b.width, b.width, b.width)}.get(b.family)
        if layers is None:
            return {name: shape for name, shape in model_shapes(b).items() if len(shape) == 1}
        found = {f"layer{i}.bias{k}": (size,) for i in range(b.layers) for k, size in enumerate(layers)}
        return found | ({"norm.bias": (b.width,)} if b.family == "gpt2" else {})

    def prepare(self, lesson: Lesson) -> dict[str, torch.nn.Parameter]:
        every = dict(lesson.module.named_parameters())
        return {name: every[name] for name in _vectors({n: tuple(p.shape) for n, p in every.items()})}

    def result(self, lesson: Lesson, value: Callable[[str], torch.Tensor]) -> Delta:
        from fivefold.training.delta import Delta

        return Delta(weights={name: partial(value, name) for name in lesson.trained}, sparse=frozenset(lesson.trained))

    def covered(self, lesson: Lesson) -> str:
        total = sum(p.numel() for p in lesson.module.parameters())
        share = f"{self.numbers(lesson) / total:.3%} of the model"
        if all(name.endswith("bias") for name in lesson.trained):
            return f"{len(lesson.trained)} biases, {share}"
        return f"there are no biases, so the gains of {len(lesson.trained)} norms, {share}"


def _vectors(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The biases, or all vectors where there are none."""
    vectors = [name for name, shape in shapes.items() if len(shape) == 1]
    return [name for name in vectors if name.endswith("bias")] or vectors
