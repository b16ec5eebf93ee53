"""What a fine-tuning technique is: an edit of the train plan, and the few places where the one loop asks it something.

A recipe may hold one technique of each kind; they meet in the plan and training runs once, when the recipe leaves the
stage (`Technique.finish`):

    Adaptation   which numbers are trained: all weights, biases, a mask, an adapter          default: all weights
    Update       how a gradient (or none) changes them: AdamW, 8 bits, LOMO, GaLore, ...       default: AdamW
    Saving       what memory is traded for: activations made again, states kept on disk        default: nothing

The plan names its techniques in the recipe's own spelling, so it stays plain data; `methods_of` turns them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from fivefold.errors import Misfit
from fivefold.files import sha256
from fivefold.model import Blueprint, Model, TrainPlan, Trait
from fivefold.recipe import Recipe, Technique

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fivefold.training.delta import Delta
    from fivefold.training.optimizer import Optimizer

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class FineTuning(Technique):
    """Base of the three kinds. A subclass adds fields and overrides the hooks of its kind."""

    lowers = {"memory": "direct", "compute": "indirect", "network": "direct"}
    may_raise = ("quality",)

    def check(self, model: Model) -> None:
        if model.train.data is None:
            raise Misfit(f"{self.name} needs examples to learn from; run: fivefold train MODEL --data FILE")

    def plan(self, model: Model) -> Model:
        return model.but(train=self.edited(replace(model.train, methods=(*model.train.methods, str(self)))))

    def edited(self, plan: TrainPlan) -> TrainPlan:
        """The plan with this technique's settings in it. Default: unchanged."""
        return plan

    def apply(self, model: Model) -> Model:
        return self.plan(model).covered(f"{self.name}: in the train plan")

    def finish(self, model: Model) -> Model:
        from fivefold.training.run import train

        return train(model)

    def inputs(self, model: Model) -> str:
        return sha256(model.train.data) if model.train.data is not None and model.train.data.is_file() else ""

    def effort(self, model: Model) -> float:
        plan = model.train
        return 6.0 * model.blueprint.parameters * plan.tokens_per_step * max(1, plan.steps)

    def effort_once(self, model: Model) -> float:
        return 0.0


NEEDS = frozenset({Trait.TRAINABLE, Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.UNFITTED})


@dataclass(eq=False)
class Lesson:
    """What the loop hands to the hooks: the module, its plan, and what is trained. `extra` is the technique's own."""

    model: Model
    module: nn.Module
    plan: TrainPlan
    trained: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Adaptation(FineTuning):
    needs = NEEDS | {Trait.OPEN_PARAMETERS}
    breaks = frozenset({Trait.OPEN_PARAMETERS})
    whole: ClassVar[bool] = False
    """True: what is trained are numbers of the model itself, held as the plan says; else float32 beside it."""
    fused: ClassVar[bool] = False
    """True: a parameter may be updated as soon as its gradient is complete (no hook needs all gradients)."""
    lean: ClassVar[bool] = True
    """False: the layers must stay as they are (a method that wraps or replaces them)."""

    def shapes(self, blueprint: Blueprint) -> Shapes:
        """Name -> shape of every number trained, by formula. Rows for memory; names need not be the module's."""
        raise NotImplementedError

    def weight_bytes(self, blueprint: Blueprint, element: int) -> float:
        """Bytes of the weights that are computed with; `element` per number."""
        return float(element * blueprint.parameters)

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype to compute in, given the plan's."""
        return dtype

    def load(self, model: Model, dtype: torch.dtype) -> Any:
        """The module to train, without gradients."""
        from fivefold.training.module import load_module

        return load_module(model, dtype)

    def hidden(self, lesson: Lesson) -> Callable[..., torch.Tensor] | None:
        """Another way from tokens to final hidden states than the decoder's own; None: its own."""
        return None

    def default_optimizer(self) -> Optimizer:
        """When the recipe names no update."""
        from fivefold.training.adamw import AdamW

        return AdamW()

    def prepare(self, lesson: Lesson) -> dict[str, torch.nn.Parameter]:
        """Change `lesson.module` as needed; the parameters to train by name. All others get no gradient."""
        raise NotImplementedError

    def penalty(self, lesson: Lesson, step: int) -> torch.Tensor | None:
        """A term added to the loss of every step, differentiable."""
        return None

    def gradients(self, lesson: Lesson, step: int) -> None:
        """After the backward pass and before the update of 1-based `step`: may change gradients in place."""

    def stepped(self, lesson: Lesson, step: int) -> None:
        """After the update of 1-based `step`."""

    def buffers(self, lesson: Lesson) -> Mapping[str, torch.Tensor]:
        """Tensors of the technique's own that a resumed run must find again; restored in place."""
        return {}

    def result(self, lesson: Lesson, value: Callable[[str], torch.Tensor]) -> Delta:
        """What was learned, after the best state was restored; `value(name)` is a trained number in float32."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Update(FineTuning):
    needs = NEEDS | {Trait.OPEN_OPTIMIZER}
    breaks = frozenset({Trait.OPEN_OPTIMIZER})

    def optimizer(self, plan: TrainPlan) -> Optimizer:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Saving(FineTuning):
    needs = NEEDS | {Trait.OPEN_ACTIVATIONS}
    breaks = frozenset({Trait.OPEN_ACTIVATIONS})

    def install(self, lesson: Lesson) -> None:
        """Change how the module runs; called once, after `Adaptation.prepare`."""


@dataclass(frozen=True, kw_only=True)
class Methods:
    """The techniques of a plan, one per kind; None is the kind's default."""

    adaptation: Adaptation | None = None
    update: Update | None = None
    saving: Saving | None = None

    @classmethod
    def of(cls, plan: TrainPlan) -> Self:
        found: dict[str, FineTuning] = {}
        for technique in techniques(plan):
            for kind, base in (("adaptation", Adaptation), ("update", Update), ("saving", Saving)):
                if isinstance(technique, base):
                    found[kind] = technique
        return cls(**found)  # type: ignore[arg-type]


def techniques(plan: TrainPlan) -> Iterator[Technique]:
    for spelled in plan.methods:
        yield from Recipe.parse(spelled)


def model_shapes(blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """Name -> (outputs, inputs) of every matrix of a decoder, and its norms: the rows of the memory formulas."""
    b = blueprint
    heads, keys = b.heads * b.head_dim, b.kv_heads * b.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "q": (heads, b.width), "k": (keys, b.width), "v": (keys, b.width), "o": (b.width, heads),
        **({"gate": (b.ffn, b.width)} if b.gated else {}), "up": (b.ffn, b.width), "down": (b.width, b.ffn),
        "norm1": (b.width,), "norm2": (b.width,),
    }
    out: dict[str, tuple[int, ...]] = {"embedding": (b.vocab, b.width), "norm": (b.width,)}
    if not b.tied:
        out["head"] = (b.vocab, b.width)
    return out | {f"layer{i}.{name}": shape for i in range(b.layers) for name, shape in layer.items()}


def linear_shapes(blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """The linear layers inside the decoder's layers."""
    return {name: s for name, s in model_shapes(blueprint).items() if name.startswith("layer") and len(s) == 2}
