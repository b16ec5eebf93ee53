"""MeZO: fine-tuning with forward passes only, in the memory of inference.

    z ~ N(0, 1) per weight        g = (loss(w + eps z) - loss(w - eps z)) / (2 eps)        w <- w - rate * g * z

On average over z this is the gradient of the loss smoothed with noise of width eps, so descent goes the right way,
but each step knows the slope in one random direction only: its noise grows with the number of weights, which is why
the rate is small and the steps are many (thousands). z is drawn three times from the same seed instead of being kept:
there are no gradients, no averages and no stored activations.

Weights are moved there and back in exact arithmetic (multiples of one step per tensor), so that they do not drift;
weights in bfloat16 need their other halves for that (held="split").

It helps where nothing else fits, and for a model that nearly knows the task already. It does not help when a backward
pass fits: any adapter learns more per second. There is nothing to save activations of, so `checkpoint_activations` and
`offload` do not go with it.

Source: Malladi et al., arXiv 2305.17333; the estimate is Spall's, IEEE TAC 1992.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from fivefold.errors import Misfit
from fivefold.model import Model, TrainPlan, Trait
from fivefold.space import Fixed, Range, Search
from fivefold.training.method import Adaptation, Methods, Update, rate_for

if TYPE_CHECKING:
    from fivefold.training.optimizer import Optimizer


@dataclass(frozen=True, kw_only=True)
class Mezo(Update):
    needs = Update.needs | {Trait.OPEN_ACTIVATIONS}
    breaks = Update.breaks | {Trait.OPEN_ACTIVATIONS}
    headline = "30B on one A100-80 (Adam 2.7B); OPT-13B within 1% of full on 7/11 tasks at 1/12 memory"
    passes = 2.0

    eps: Annotated[float, Range(1e-6, 1, log=True), Search(1e-3, 1e-2)] = 1e-3
    """Width of the noise in which the slope is measured."""
    rate: Annotated[float, Range(0, 1e-1), Fixed()] = 0.0
    """Peak learning rate; 0: 1e-6 for the model's own weights, 1e-4 for numbers beside them."""

    def check(self, model: Model) -> None:
        super().check(model)
        plan = model.train
        if plan.held != "split":
            raise Misfit(f'mezo moves every weight there and back, which held="{plan.held}" does not survive;'
                         ' use full(held="split")')
        other = Methods.of(plan).adaptation
        if other is not None and any(
            getattr(type(other), hook) is not getattr(Adaptation, hook) for hook in ("gradients", "penalty")
        ):
            raise Misfit(f"{other.name} works on gradients or adds to the loss, and mezo makes neither; remove one")

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate or rate_for(plan, 1e-6, 1e-4))

    def optimizer(self, plan: TrainPlan) -> Optimizer:
        from fivefold.training.optimizers.mezo import MeZO

        return MeZO(eps=self.eps, seed=plan.seed)
