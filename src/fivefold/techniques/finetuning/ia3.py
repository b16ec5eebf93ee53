"""(IA)3: keys, values and the feed-forward block's inner activations are each multiplied by one learned vector.

    k <- l_k * k        v <- l_v * v        y = W_down (l_f * p)        l starts at one

2 x key-value width + feed-forward width numbers per layer: the smallest of the adapters.
Scaling an output scales the rows of the matrix before it, scaling an input the columns of the one behind it, so all of
it merges into the weights: the model served is as fast as before. At the start the model is the parent, exactly.

It can amplify and mute what the model already computes, and compute nothing new: right for few examples (its authors
beat in-context learning with it at a thousandth of the work), too little for a new domain.

A family with one matrix for queries, keys and values (GPT-2) has queries scaled too, as in `peft`, which makes and
saves the adapter; the passes are our own (`_shared.lean_adapters`).

Source: Liu et al., arXiv 2205.05638.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from fivefold.errors import ModelError
from fivefold.model import Blueprint, TrainPlan
from fivefold.space import Fixed, Range
from fivefold.training.method import Adaptation, Lesson, Shapes

if TYPE_CHECKING:
    import torch

    from fivefold.training.delta import Delta

PLACES = (("k_proj", "v_proj", "down_proj"), ("c_attn", "mlp.c_proj"))
"""Names of the layers, the feed-forward one last, as families spell them."""


@dataclass(frozen=True, kw_only=True)
class Ia3(Adaptation):
    blocks = False
    libraries = ("peft",)
    headline = "T-Few beats in-context learning at 1000x less"
    perturbation = 2.0

    rate: Annotated[float, Range(1e-7, 1e-1, log=True), Fixed()] = 3e-3
    """Peak learning rate."""

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate)

    def shapes(self, blueprint: Blueprint) -> Shapes:
        b = blueprint
        layer = {"k": (b.kv_heads * b.head_dim,), "v": (b.kv_heads * b.head_dim,), "ffn": (b.ffn,)}
        if b.family == "gpt2":
            layer["q"] = (b.heads * b.head_dim,)
        return {f"layer{i}.{name}": shape for i in range(b.layers) for name, shape in layer.items()}

    def kept(self, blueprint: Blueprint) -> float:
        b = blueprint
        return float(b.kv_heads * b.head_dim - b.heads * b.head_dim)

    def prepare(self, lesson: Lesson) -> dict[str, torch.nn.Parameter]:
        from fivefold.engines._peft import peft
        from fivefold.techniques._shared import lean_adapters
        from fivefold.techniques._shared.adapters import adapted, inject, turned
        from fivefold.techniques._shared.modules import linears

        names = [name for name, _ in linears(lesson.module)]
        places = next((p for p in PLACES if all(any(n.endswith(f".{one}") for n in names) for one in p)), None)
        if places is None:
            raise ModelError(f"{lesson.module.config.model_type} has no {', '.join(PLACES[0])} for ia3; use lora there")
        config = peft().IA3Config(
            target_modules=list(places), feedforward_modules=[places[-1]], fan_in_fan_out=turned(lesson),
            task_type="CAUSAL_LM",
        )
        trained = inject(lesson, config)
        for layer in adapted(lesson).values():
            lean_adapters.use(layer, lean_adapters.ia3)
        return trained

    def result(self, lesson: Lesson, value: Callable[[str], torch.Tensor]) -> Delta:
        from fivefold.techniques._shared.adapters import NAME, adapted, merged, turned
        from fivefold.training.run import stored_value

        flipped = turned(lesson)

        def scaled(layer: Any, stored: torch.Tensor) -> torch.Tensor:
            gain = layer.ia3_l[NAME].detach().flatten()
            return stored * (gain if layer.is_feedforward != flipped else gain[:, None])

        def bias(name: str, layer: Any) -> torch.Tensor:
            return stored_value(lesson, name) * layer.ia3_l[NAME].detach().flatten()

        delta = merged(lesson, scaled)
        biases = {f"{name}.bias": partial(bias, f"{name}.bias", layer) for name, layer in adapted(lesson).items()
                  if not layer.is_feedforward and layer.get_base_layer().bias is not None}
        return replace(delta, weights={**delta.weights, **biases})
