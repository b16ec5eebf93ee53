"""What each way of fine-tuning would take on this machine, before any of it is run, and which one to use.

    memory    by the formula of `training.memory`; that of its serving engine afterwards, where it is judged
    time      2 x parameters x positions x passes / (rate x REACHED): one pass forward, one back to the inputs, one to
              the weights where they are trained; the head only for the positions that are learned; then the judging
    energy    the power model at all cores busy x time;  money: machine hours and electricity of that

A way that does not fit is refused with the part that is too large. Limits on time, energy and money shorten a run, but
not below `LEAST_STEPS`. Among those that fit, the choice follows `ORDER`: what asks least for what it usually reaches
comes first. It is a judgement; what was measured so far is in docs/benchmarks.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fivefold.budget import TrainingBudget
from fivefold.errors import Infeasible, UserError
from fivefold.metrics import show
from fivefold.model import Blueprint, TrainPlan
from fivefold.recipe import Recipe, catalogue
from fivefold.study.surroundings import REACHED, UNITS, Steps, Surroundings
from fivefold.training.memory import Needs, needs
from fivefold.training.method import Adaptation, FineTuning, Methods, completed
from fivefold.training.optimizer import Optimizer

ORDER = ("lora", "lora + checkpoint_activations", "full", "adamw8bit", "badam", "qlora", "mezo")
LEAST_STEPS = 10
SIZES = (1024, 512, 256)
"""Positions that pass the model together, the largest that fits being used."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One way, with its plan; `why_not` is empty when it fits. seconds, J, USD are of the whole run, judging included;
    `judging` are the bytes that takes. `refused`: by the model, or by which limit."""

    recipe: Recipe
    plan: TrainPlan
    needs: Needs | None
    judging: float = 0.0
    per_step: float = math.nan
    seconds: float = math.nan
    joules: float = math.nan
    usd: float = math.nan
    trained: int = 0
    why_not: str = ""
    refused: Literal["", "model", "memory", "time", "energy", "money"] = ""

    @property
    def most(self) -> float:
        """Bytes at the peak, of training or of judging."""
        return max(self.needs.peak if self.needs else math.inf, self.judging)


def forecast(recipe: Recipe, around: Surroundings) -> Forecast:
    """What the recipe would take, at the largest batch that fits. Never raises for what does not fit."""
    try:
        planned = recipe.plan(around.model)
        plan = completed(planned.train)
        _room(recipe, planned.blueprint, around)
    except UserError as error:
        return Forecast(recipe=recipe, plan=around.model.train, needs=None, why_not=str(error), refused="model")
    methods = Methods.of(plan)
    adaptation = methods.adaptation
    assert adaptation is not None
    optimizer = methods.update.optimizer(plan) if methods.update else adaptation.default_optimizer()
    fused = adaptation.fused and optimizer.needs_gradients
    sizes = [plan.tokens_per_step] if fused else [s for s in SIZES if s <= max(plan.tokens_per_step, SIZES[-1])]
    tried: list[Forecast] = []
    for size in sizes:
        tried.append(_at(recipe, replace(plan, at_once=size), methods, adaptation, optimizer, around))
        if tried[-1].refused != "memory":
            break
    return tried[-1]


def _room(recipe: Recipe, blueprint: Blueprint, around: Surroundings) -> None:
    """Raises UserError where a technique takes so much of the context that an example no longer fits."""
    long = max(around.examples.rows, key=lambda row: len(row.tokens))
    most = max(len(long.tokens), around.exam.longest)
    if most > blueprint.context:
        raise UserError(f"{recipe} leaves {blueprint.context} places of the context and the longest example has {most}"
                        " tokens; shorten it, or choose another way")


def _at(
    recipe: Recipe, plan: TrainPlan, methods: Methods, adaptation: Adaptation, optimizer: Optimizer,
    around: Surroundings,
) -> Forecast:
    blueprint, stream = around.model.blueprint, around.stream(plan)
    plan = replace(plan, at_once=max(plan.at_once, stream.length))
    steps = Steps.of(stream, plan.at_once)
    shapes = adaptation.shapes(blueprint)
    held = around.process(adaptation.libraries)
    wanted = plan.steps or max(1, math.ceil(plan.epochs * steps.number))
    need = needs(
        blueprint, plan, methods, element=around.element, process=held.peak, optimizer=optimizer,
        fused=adaptation.fused and optimizer.needs_gradients, whole=adaptation.whole, shapes=shapes,
        kept_layers=methods.saving.kept_layers(blueprint) if methods.saving else None, stored=around.stored,
        same=around.same, learned=steps.learned_at_once, entered=held.entered, steps=wanted,
    )
    per_step = seconds_per_step(steps, stream.length, methods, adaptation, around)
    limit, judging = around.allowed()[0], around.judging_seconds()
    training = max(0.0, limit - judging)
    done = min(wanted, int(training / per_step)) if math.isfinite(training) else wanted
    spent = around.spent(done * per_step + judging)
    found = Forecast(
        recipe=recipe, plan=replace(plan, seconds=training if math.isfinite(training) else 0.0), needs=need,
        judging=around.judging_bytes(held.peak), per_step=per_step, seconds=spent["time"], joules=spent["energy"],
        usd=spent["money"], trained=sum(math.prod(shape) for shape in shapes.values()),
    )
    return _refused(found, min(LEAST_STEPS, wanted), done, around)


def seconds_per_step(
    steps: Steps, length: int, methods: Methods, adaptation: Adaptation, around: Surroundings
) -> float:
    """`length` is that of a row: on average half of it is attended."""
    b = around.model.blueprint
    passes = adaptation.passes if methods.update is None or methods.update.passes is None else methods.update.passes
    if methods.saving is not None:
        passes += 1 - methods.saving.kept_layers(b) / b.layers
    head = b.vocab * b.width
    layers = steps.positions * (2.0 * (b.matrix_parameters - head) + 2 * b.layers * b.heads * b.head_dim * length)
    return passes * (layers + 2.0 * steps.learned * head) / (REACHED * around.rate(around.dtype))


def _refused(found: Forecast, least: int, steps: int, around: Surroundings) -> Forecast:
    """The forecast with the first limit it breaks; `least` steps must be possible."""
    assert found.needs is not None
    memory = around.budget.memory
    if memory is not None and found.needs.peak > memory:
        why = f"needs {show(found.needs.peak, 'byte')} of memory; the largest part is {_largest(found.needs)}"
        return replace(found, refused="memory", why_not=why)
    if memory is not None and found.judging > memory:
        why = f"fits, but judging the model where it is served needs {show(found.judging, 'byte')} of memory"
        return replace(found, refused="memory", why_not=why)
    name = around.allowed()[1]
    if steps >= least or not name:
        return found
    needed = around.spent(around.judging_seconds() + least * found.per_step)[name]
    why = f"takes {show(needed, UNITS[name])} for {_count(least)}, judging included"
    return replace(found, refused=name, why_not=why)  # type: ignore[arg-type]


def _count(steps: int) -> str:
    return "one step" if steps == 1 else f"{steps} steps"


def _largest(need: Needs) -> str:
    parts = {"the process itself": need.process, "the weights": need.weights + need.beside,
             "gradients": need.gradients + need.waiting, "optimiser state": need.state, "activations": need.activations,
             "the head's logits": need.head}
    if need.loading >= need.peak:
        parts = {"the process itself": need.process, "reading the weights": need.loading - need.process}
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
    known = [f for f in found if f.refused != "model"]
    if not known:
        raise UserError(found[0].why_not)
    alone = len(found) == 1
    roomy = [f for f in known if f.refused != "memory"]
    if not roomy:
        near = min(known, key=lambda f: f.most)
        what = f"{near.recipe} does not fit" if alone else "no way of fine-tuning fits"
        which = "it" if alone else f"the smallest, {near.recipe},"
        raise Infeasible(f"{what} {show(budget.memory, 'byte')}: {which} {near.why_not}; allow"
                         f" {show(_rounded(near.most), 'byte')}" + (", or leave --recipe out" if alone else ""))
    near = min(roomy, key=lambda f: f.per_step)
    name = near.refused
    what = f"{near.recipe} does not fit" if alone else "no way of fine-tuning fits"
    which = "it" if alone else f"the fastest, {near.recipe},"
    raise Infeasible(f"{what} {name}<={show(getattr(budget, name), UNITS[name])}: {which} {near.why_not}; allow more"
                     f" {name}, or judge by fewer --items")


def _rounded(size: float) -> float:
    """Up to three digits, so that what is advised is enough as it is shown."""
    unit = 10.0 ** (math.floor(math.log10(size)) - 2)
    return math.ceil(size / unit) * unit
