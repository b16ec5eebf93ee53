"""What each way of fine-tuning would take on this machine, before any of it is run, and which one to use.

    memory    by the formula of `training.memory`
    time      2 x parameters x positions x passes / (rate x REACHED): one pass forward, one back to the inputs, one to
              the weights where they are trained; the head only for the positions that are learned
    energy    the power model at all cores busy x time;  money: machine hours and electricity of that

A way that does not fit is refused with the part that is too large. Among those that fit, the choice follows `ORDER`,
which is a measured one: docs/benchmarks.md says what each reached on the same examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fivefold.budget import TrainingBudget
from fivefold.errors import Infeasible, UserError
from fivefold.machine import Machine
from fivefold.meters import money
from fivefold.meters.energy import PowerModel
from fivefold.meters.money import Prices
from fivefold.metrics import show
from fivefold.model import Model, TrainPlan
from fivefold.quantity import Quantity
from fivefold.recipe import Recipe, catalogue
from fivefold.training.batching import Stream
from fivefold.training.data import Examples
from fivefold.training.memory import Needs, needs
from fivefold.training.method import Adaptation, FineTuning, Methods, completed

ORDER = ("lora", "lora + checkpoint_activations", "full", "adamw8bit", "badam", "qlora", "mezo")
REACHED = 0.45
"""Share of the machine's rate of large products that training reaches here, all work counted."""
LEAST_STEPS = 10
SIZES = (1024, 512, 256)
"""Positions that pass the model together, the largest that fits being used."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One way, with its plan; `why_not` is empty when it fits. seconds, J, USD for the whole run."""

    recipe: Recipe
    plan: TrainPlan
    needs: Needs | None
    seconds: float = math.nan
    joules: float = math.nan
    usd: float = math.nan
    trained: int = 0
    why_not: str = ""


@dataclass(frozen=True)
class Surroundings:
    """What a forecast depends on besides the recipe. `process` is the bytes this process already holds."""

    model: Model
    examples: Examples
    budget: TrainingBudget
    machine: Machine
    prices: Prices
    process: float
    element: int

    def watts(self) -> float:
        power = PowerModel.of(self.machine)
        return power.active * self.machine.cores

    def usd(self, seconds: float, joules: float) -> float:
        spent = money.cost(self.prices, self.machine, seconds=Quantity(value=seconds, unit="s", method="modelled"),
                           joules=Quantity(value=joules, unit="J", method="modelled"))
        return float(spent.value or 0.0)

    def seconds_allowed(self) -> float:
        """The time limit, or the time in which the energy or the money is used up; inf without a limit."""
        limits = [self.budget.time]
        if self.budget.energy is not None:
            limits.append(self.budget.energy / self.watts())
        if self.budget.money is not None:
            limits.append(self.budget.money / self.usd(1.0, self.watts()))
        return min((limit for limit in limits if limit is not None), default=math.inf)


def forecast(recipe: Recipe, around: Surroundings) -> Forecast:
    """What the recipe would take, at the largest batch that fits. Never raises for what does not fit."""
    try:
        plan = completed(recipe.plan(around.model).train)
    except UserError as error:
        return Forecast(recipe=recipe, plan=around.model.train, needs=None, why_not=str(error))
    methods = Methods.of(plan)
    adaptation = methods.adaptation
    assert adaptation is not None
    fused = adaptation.fused
    sizes = [plan.tokens_per_step] if fused else [s for s in SIZES if s <= max(plan.tokens_per_step, SIZES[-1])]
    tried = [_at(recipe, replace(plan, at_once=size), methods, adaptation, around) for size in sizes]
    return next((f for f in tried if not f.why_not), tried[-1])


def _at(recipe: Recipe, plan: TrainPlan, methods: Methods, adaptation: Adaptation, around: Surroundings) -> Forecast:
    blueprint = around.model.blueprint
    stream = Stream(around.examples.rows, plan.tokens_per_step, plan.at_once, plan.seed, plan.layout)
    plan = replace(plan, at_once=max(plan.at_once, stream.length))
    optimizer = methods.update.optimizer(plan) if methods.update else adaptation.default_optimizer()
    kept = methods.saving.kept_layers(blueprint) if methods.saving else None
    need = needs(
        blueprint, plan, methods, element=around.element, process=around.process, optimizer=optimizer,
        fused=adaptation.fused and optimizer.needs_gradients, kept_layers=kept, whole=adaptation.whole,
        shapes=adaptation.shapes(blueprint),
    )
    per_step = _seconds_per_step(plan, methods, adaptation, around)
    steps = plan.steps or max(1, math.ceil(plan.epochs * len(stream.epoch(0))))
    allowed = around.seconds_allowed()
    steps = min(steps, int(allowed / per_step)) if math.isfinite(allowed) else steps
    seconds = steps * per_step
    joules = seconds * around.watts()
    limit = around.budget.memory
    why = ""
    if limit is not None and need.peak > limit:
        why = f"needs {show(need.peak, 'byte')} of memory; the largest part is {_largest(need)}"
    elif steps < LEAST_STEPS and math.isfinite(allowed):
        why = f"a step takes about {per_step:.1f} s, so {show(allowed, 's')} allow only {steps} steps"
    return Forecast(
        recipe=recipe, plan=replace(plan, seconds=allowed if math.isfinite(allowed) else 0.0), needs=need,
        seconds=seconds, joules=joules, usd=around.usd(seconds, joules), why_not=why,
        trained=sum(math.prod(shape) for shape in adaptation.shapes(blueprint).values()),
    )


def _seconds_per_step(plan: TrainPlan, methods: Methods, adaptation: Adaptation, around: Surroundings) -> float:
    blueprint = around.model.blueprint
    passes = adaptation.passes if methods.update is None or methods.update.passes is None else methods.update.passes
    if methods.saving is not None:
        passes += 1 - methods.saving.kept_layers(blueprint) / blueprint.layers
    head = blueprint.vocab * blueprint.width
    learned = sum(int(row.learn.sum()) for row in around.examples.rows) / max(1, around.examples.tokens)
    flops = 2.0 * plan.tokens_per_step * passes * (blueprint.matrix_parameters - head + learned * head)
    rate = around.machine.gemm("bfloat16" if around.element == 2 else "float32").value or 1e11
    return flops / (REACHED * rate)


def _largest(need: Needs) -> str:
    parts = {"the process itself": need.process, "weights": need.weights + need.beside, "gradients": need.gradients,
             "optimiser state": need.state, "activations": need.activations, "the head's logits": need.head,
             "reading the weights": need.loading - need.process}
    name = max(parts, key=lambda k: parts[k])
    return f"{name} ({show(parts[name], 'byte')})"


def ways(given: str = "") -> list[Recipe]:
    """The recipe given, or every way worth considering: those of `ORDER` first, then each technique by itself."""
    if given:
        recipe = Recipe.parse(given)
        odd = next((t for t in recipe if not isinstance(t, FineTuning)), None)
        if odd is not None or not len(recipe):
            what = f"{odd.name} is none" if odd is not None else "none was given"
            raise UserError(f"train takes fine-tuning techniques and {what}; see: fivefold catalogue")
        return [recipe]
    return list(dict.fromkeys([*_known(ORDER), *_single()]))


def _known(spelled: Sequence[str]) -> Iterator[Recipe]:
    for text in spelled:
        if all(part.strip() in catalogue() for part in text.split("+")):
            yield Recipe.parse(text)


def _single() -> Iterator[Recipe]:
    for name, technique in catalogue().items():
        if issubclass(technique, FineTuning):
            yield Recipe.parse(name)


def choose(found: Sequence[Forecast], budget: TrainingBudget) -> Forecast:
    """The first that fits, in the order given. Raises Infeasible naming the way that comes nearest."""
    fitting = [f for f in found if not f.why_not]
    if fitting:
        return fitting[0]
    known = [f for f in found if f.needs is not None]
    if not known:
        raise UserError(found[0].why_not)
    near = min(known, key=lambda f: f.needs.peak if f.needs else math.inf)
    assert near.needs is not None
    if budget.memory is not None and near.needs.peak > budget.memory:
        raise Infeasible(f"no way of fine-tuning fits {show(budget.memory, 'byte')}; the smallest, {near.recipe},"
                         f" {near.why_not}: allow {show(math.ceil(near.needs.peak / 1e7) * 1e7, 'byte')}")
    raise Infeasible(f"{near.recipe}: {near.why_not}; allow more time")
