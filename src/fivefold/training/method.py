"""What a fine-tuning technique is: an edit of the train plan, and the few places where the one loop asks it something.

A recipe may hold one technique of each kind; they meet in the plan and training runs once, when the recipe leaves the
stage (`Technique.finish`):

    Adaptation   which numbers are trained: all weights, biases, a mask, an adapter          default: all weights
    Update       how a gradient (or none) changes them: AdamW, 8 bits, LOMO, GaLore, ...       default: AdamW
    Saving       what memory is traded for: activations made again, states kept on disk        default: nothing

The plan names its techniques in the recipe's own spelling, so it stays plain data; `Methods.of` turns them back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from fivefold.errors import Misfit
from fivefold.files import sha256
from fivefold.model import ADAPTER, Blueprint, Model, TrainPlan, Trait
from fivefold.recipe import Recipe, Technique

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fivefold.training.delta import Delta
    from fivefold.training.optimizer import Optimizer
    from fivefold.training.shelf import Shelf

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class FineTuning(Technique):
    """Base of the three kinds. A subclass adds fields and overrides the hooks of its kind."""

    lowers = {"memory": "direct", "compute": "indirect", "network": "direct"}
    may_raise: ClassVar[tuple[str, ...]] = ("quality",)

    def check(self, model: Model) -> None:
        if model.train.data is None:
            raise Misfit(f"{self.name} needs examples to learn from; run: fivefold train MODEL --data FILE")
        if (model.path / ADAPTER).is_dir():
            raise Misfit(f"{model.name} has an adapter beside its weights; train the model that it was learned on")
        both = [*techniques(model.train), self]
        masked = next((t for t in both if isinstance(t, Adaptation) and t.masks), None)
        dense = next((t for t in both if isinstance(t, Update) and not t.by_number), None)
        if masked and dense:
            raise Misfit(f"{masked.name} masks gradients, and {dense.name} also moves numbers without one; remove one")

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
    passes: ClassVar[float] = 2.0
    """Work of a step in forward passes: 1 forward, 1 back to the inputs, 1 to the weights if they are trained."""
    whole: ClassVar[bool] = False
    """True: what is trained are numbers of the model itself, held as the plan says; else float32 beside it."""
    fused: ClassVar[bool] = False
    """True: a parameter may be updated as soon as its gradient is complete (no hook needs all gradients)."""
    lean: ClassVar[bool] = True
    """False: the layers must stay as they are (a method that wraps or replaces them)."""
    blocks: ClassVar[bool] = True
    """False: its layers are none that keep what they need in a block of their own (`training.layer`)."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Packages it imports that training with other adaptations does not: a process is larger by them."""
    masks: ClassVar[bool] = False
    """True: it changes gradients, and numbers whose gradient it makes zero must stay as they are."""

    def shapes(self, blueprint: Blueprint) -> Shapes:
        """Name -> shape of every number trained, by formula. Rows for memory; names need not be the module's."""
        raise NotImplementedError

    def weight_bytes(self, blueprint: Blueprint, element: int) -> float:
        """Bytes of the weights that are computed with; `element` per number."""
        return float(element * sum(math.prod(shape) for shape in model_shapes(blueprint).values()))

    def mapped(self, blueprint: Blueprint, stored: int = 4, same: bool = False) -> float:
        """Bytes of the files, `stored` per number, that are mapped while the weights are made of them; files that hold
        the `same` type as is computed with become the weights themselves."""
        return 0.0 if same else float(stored * blueprint.parameters)

    def kept(self, blueprint: Blueprint) -> float:
        """Numbers one layer keeps per position until its backward pass, besides those of `memory.layer_elements`."""
        return 0.0

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

    def ready(self, lesson: Lesson, loss: Callable[[Any], torch.Tensor], batches: Callable[[int], Any]) -> None:
        """Before the first step, also of a resumed run; `batches(step)` are a 0-based step's, each with its share."""

    def rates(self, lesson: Lesson) -> Mapping[str, float]:
        """Learning rates by name of what is trained, as multiples of the plan's; 1 where not named."""
        return {}

    def phases(self, lesson: Lesson) -> Sequence[int]:
        """After how many steps training begins anew: fresh optimiser, own schedule; scores of the last phase count."""
        return ()

    def anew(self, lesson: Lesson, value: Callable[[str], torch.Tensor]) -> Iterable[str]:
        """Called there; the trained numbers it names return to their stored values. `value` as in `result`."""
        return ()

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

    def numbers(self, lesson: Lesson) -> int:
        """How many numbers the result was trained in."""
        return sum(p.numel() for p in lesson.trained.values())

    def covered(self, lesson: Lesson) -> str:
        """Which part of the model that is, where the number alone does not say it."""
        return ""


@dataclass(frozen=True, kw_only=True)
class Update(FineTuning):
    needs = NEEDS | {Trait.OPEN_OPTIMIZER}
    breaks = frozenset({Trait.OPEN_OPTIMIZER})
    perturbation = 8.0
    """After every adaptation, so that an optimiser unlike AdamW has the last word on the rate."""

    passes: ClassVar[float | None] = None
    """Forward passes' worth of work of a step, where it is not the adaptation's."""
    by_number: ClassVar[bool] = False
    """True: it follows gradients, and a number whose gradient was zero in every step stays bit for bit as it was."""

    def optimizer(self, plan: TrainPlan) -> Optimizer:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Saving(FineTuning):
    needs = NEEDS | {Trait.OPEN_ACTIVATIONS}
    breaks = frozenset({Trait.OPEN_ACTIVATIONS})

    def install(self, lesson: Lesson) -> None:
        """Change how the module runs; called once, after `Adaptation.prepare`."""

    def kept_layers(self, blueprint: Blueprint) -> float:
        """How many layers keep all their activations: a row of the memory formula."""
        return float(blueprint.layers)

    def resident(self, sizes: Sequence[float]) -> float:
        """Bytes in main memory of the optimiser's state (or of what lies beside weights), `sizes` by parameter."""
        return float(sum(sizes))

    def shelf(self, lesson: Lesson, folder: Path) -> Shelf | None:
        """Where the optimiser's state, and what lies beside weights, is kept between updates; None: in memory."""
        return None


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


def rate_for(plan: TrainPlan, whole: float, beside: float | None = None) -> float:
    """The rate of an update that was given none: `whole` for numbers of the model itself, `beside` for others.

    `beside` None: the rates are AdamW's, so one that an adaptation chose stays.
    """
    adaptation = Methods.of(plan).adaptation
    if adaptation is None:
        return whole
    if beside is None:
        return plan.learning_rate
    return whole if adaptation.whole else beside


def completed(plan: TrainPlan) -> TrainPlan:
    """The plan with all weights trained when it names no adaptation; the techniques it names have the last word."""
    from fivefold.recipe import make

    named = [t for t in techniques(plan) if isinstance(t, FineTuning)]
    if any(isinstance(t, Adaptation) for t in named):
        return plan
    default = make("full", {})
    assert isinstance(default, Adaptation)
    done = default.edited(plan)
    for technique in named:
        done = technique.edited(done)
    return replace(done, methods=(str(default), *plan.methods))


def techniques(plan: TrainPlan) -> Iterator[Technique]:
    for spelled in plan.methods:
        yield from Recipe.parse(spelled)


def boundary(name: str, plan: TrainPlan, share: float) -> int:
    """Steps of the first of two phases, `share` of all. Raises Misfit where there is no step for each."""
    if plan.steps < 2:
        raise Misfit(f"{name} trains in two phases and the plan has {plan.steps} step; give at least 2")
    return min(max(1, round(share * plan.steps)), plan.steps - 1)


def model_shapes(blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """Name -> (outputs, inputs) of every matrix of a decoder, its norms and biases: the rows of the memory formulas."""
    b = blueprint
    heads, keys = b.heads * b.head_dim, b.kv_heads * b.head_dim
    apart = {"q": (heads, b.width), "k": (keys, b.width), "v": (keys, b.width)}
    layer: dict[str, tuple[int, ...]] = {
        **({"qkv": (heads + 2 * keys, b.width)} if b.family == "gpt2" else apart), "o": (b.width, heads),
        **({"gate": (b.ffn, b.width)} if b.gated else {}), "up": (b.ffn, b.width), "down": (b.width, b.ffn),
        "norm1": (b.width,), "norm2": (b.width,),
    }
    layer |= {f"{name}.bias": layer[name][:1] for name in _biased(b.family, layer)}
    out: dict[str, tuple[int, ...]] = {"embedding": (b.vocab, b.width), "norm": (b.width,)}
    if b.family == "gpt2":
        out |= {"positions": (b.context, b.width), "norm.bias": (b.width,)}
    if not b.tied:
        out["head"] = (b.vocab, b.width)
    return out | {f"layer{i}.{name}": shape for i in range(b.layers) for name, shape in layer.items()}


def _biased(family: str, names: Iterable[str]) -> Iterable[str]:
    return {"qwen2": ("q", "k", "v"), "gpt2": tuple(names)}.get(family, ())


def linear_shapes(blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """The linear layers inside the decoder's layers."""
    return {name: s for name, s in model_shapes(blueprint).items() if name.startswith("layer") and len(s) == 2}
