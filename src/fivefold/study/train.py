"""Train: from a model, examples and a budget to a fine-tuned artifact, with what it took.

    read the examples -> forecast every way of fine-tuning, choose -> train, metered -> export, judge -> seal

Everything of a run lies in its folder (`run_folder`); `model/` is the artifact, a model like any other for `measure`,
`compare`, `serve` and `optimize`. The same command goes on with a run that was stopped, and loses at most a minute.
One process works on a run.

The artifact is judged in the engine that serves it: the log-loss of the held-out answers, and for labelled rows the
accuracy of the most likely label, both paired with the parent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fivefold.errors import Infeasible, ModelError, NotFinite, OutOfMemory, UserError
from fivefold.machine import Machine
from fivefold.meters.ledger import Cost, metered
from fivefold.meters.money import Prices
from fivefold.metrics import show
from fivefold.model import Model, TrainPlan, Trait
from fivefold.recipe import Recipe
from fivefold.study.forecast import Forecast, choose, forecast, ways
from fivefold.study.judged import Exam
from fivefold.study.request import Finished, Listener, Planned, Request
from fivefold.study.run_folder import LOG, RunFolder, exam_of
from fivefold.study.surroundings import Surroundings
from fivefold.study.watch import Watch
from fivefold.training.checkpoint import STATE
from fivefold.training.data import Examples

JUDGING, LEAST_ITEMS = 0.25, 24
REFUSED = ("allocate memory", "could not create a primitive")
"""What an allocation that fails is called by torch, by the system, and by the library of matrix products."""


def train(request: Request, listen: Listener = lambda event: None) -> Finished:
    """Raises UserError for what is wrong with the request, Infeasible when no way fits, NotFinite when the loss breaks
    (the last checkpoint stays), OutOfMemory when the run exceeds its memory, Busy when another process works on it."""
    folder = RunFolder(request.out)
    with folder.alone():
        return _train(request, folder, listen)


def _train(request: Request, folder: RunFolder, listen: Listener) -> Finished:
    from fivefold.study.sealed import left, sealed
    from fivefold.training.checkpoint import Keeper
    from fivefold.training.run import run, run_key

    machine, prices = Machine.load(), Prices.load()
    model, parts, exam = prepared(request)
    planned, around = _plan(request, folder.begun(request), model, parts, exam, machine, prices, listen)
    ready = model.but(train=planned.chosen.plan, blueprint=planned.chosen.recipe.plan(model).blueprint,
                      work=request.out)
    keeper = Keeper(request.out, run_key(ready))
    begun = keeper.meta() or {"step": 0, "seconds": 0.0}
    planned = replace(planned, resumed=begun["step"])
    listen(planned)
    window = metered(machine=machine, prices=prices)
    with naming_a_way_out(model, request.out, planned) as told, window:
        before = folder.taken(window.so_far())
        folder.begin(request, planned.chosen, around.exam, before or Cost.nothing())
        folder.cut(begun["step"])
        per_step = planned.tokens / len(around.stream(planned.chosen.plan).epoch(0))
        with Watch(
            log=request.out / LOG, budget=request.budget, chosen=planned.chosen, window=window, before=before,
            tokens=per_step, begun=(begun["step"], begun["seconds"]), listen=listen,
            reserve=around.spent(around.judging_seconds()), first=around.allowed()[1],
        ) as watch:
            told.append(watch)
            done = left(run(ready, folder.work(), parts=parts, listen=watch, enough=watch.enough, keeper=keeper))
    cost = window.cost if before is None else before + window.cost
    listen("measuring in the serving engine")
    finished = sealed(request, planned, done, cost, around.exam)
    folder.clear()
    return finished


def prepared(request: Request) -> tuple[Model, tuple[Examples, Examples], Exam]:
    """(the model with what is learned in its plan, its examples in two parts, what it is judged by); raises UserError
    for all that is wrong with them."""
    from fivefold.training.run import examples_of

    model = request.model
    if model.format == "gguf":
        raise UserError(f"{model.name} is a GGUF file and cannot be trained; give the safetensors folder it was made"
                        " from")
    if Trait.TRAINABLE not in model.traits:
        raise UserError(f"{model.name} is quantized and cannot be trained; give the float folder it was made from")
    plan = TrainPlan(
        data=request.data.expanduser().resolve(), template=request.template, epochs=request.epochs,
        steps=request.steps, tokens_per_step=request.tokens_per_step, patience=request.patience, seed=request.seed,
        dtype=model.train.dtype, held_out=model.train.held_out,
    )
    model = model.but(train=plan)
    parts = examples_of(model)
    exam = Exam.set(model, parts[1], request.task, request.test, items=request.items, template=request.template)
    return model, parts, exam


def _plan(
    request: Request, begun: Forecast | None, model: Model, parts: tuple[Examples, Examples], exam: Exam,
    machine: Machine, prices: Prices, listen: Listener,
) -> tuple[Planned, Surroundings]:
    train_part, held_part = parts
    around = surroundings(request, model, train_part, exam, machine, prices, listen)
    if begun is None:
        around = affordable(request, around, held_part)
        found = [forecast(recipe, around) for recipe in ways(request.recipe)]
        chosen = choose(found, request.budget)
    else:
        found, chosen, around = [begun], begun, replace(around, exam=exam_of(request.out))
        if request.budget.memory is not None and begun.most > request.budget.memory:
            raise Infeasible(f"the run in {request.out} needs {show(begun.most, 'byte')} of memory; allow it, or begin"
                             " a smaller one in another --out")
    return Planned(
        forecasts=tuple(found), chosen=chosen, budget=request.budget, rows=len(train_part),
        held_out=len(held_part), tokens=train_part.tokens, judged=str(around.exam),
    ), around


def affordable(request: Request, around: Surroundings, held: Examples) -> Surroundings:
    """With so few of the items that judging takes at most the share `JUDGING` of what the limits leave."""
    share = JUDGING * around.allowed()[0] / max(around.judging_seconds(), 1e-9)
    if share >= 1:
        return around
    asked = around.exam.asked
    most = max(len(around.exam.rows), len(asked.items) if asked else 0)
    items = max(min(LEAST_ITEMS, most), int(share * most))
    exam = Exam.set(around.model, held, request.task, request.test, items=items, template=request.template)
    return replace(around, exam=exam)


def surroundings(
    request: Request, model: Model, examples: Examples, exam: Exam, machine: Machine, prices: Prices,
    listen: Listener = lambda event: None,
) -> Surroundings:
    from fivefold.study import resident
    from fivefold.training.module import computing_dtype
    from fivefold.weights import read_tensors

    held = float(resident.now())
    kinds = {tensor.dtype for _, tensor in read_tensors(model.path)}
    dtype = "bfloat16" if computing_dtype(model.train.dtype).itemsize == 2 else "float32"

    @functools.cache
    def process(libraries: tuple[str, ...]) -> resident.Added:
        more = resident.added(resident.rehearsed(libraries), machine, listen)
        return resident.Added(held + more.entered, held + more.peak)

    return Surroundings(
        model=model, examples=examples, exam=exam, budget=request.budget, machine=machine, prices=prices,
        process=process, dtype=dtype, stored=4 if "F32" in kinds else 2,  # type: ignore[arg-type]
        same=kinds == {{"bfloat16": "BF16", "float32": "F32"}[dtype]},
    )


@contextmanager
def naming_a_way_out(model: Model, out: Path, planned: Planned) -> Iterator[list[Watch]]:
    """The loop's failures with what to try next; the watch goes into the list that is yielded."""
    watches: list[Watch] = []
    try:
        yield watches
    except NotFinite as error:
        what = str(error).partition(";")[0]
        if not planned.resumed and not any(watch.heard for watch in watches):
            raise NotFinite(f"{what}, with the model as it was given; check its weights and the examples") from None
        kept = f"; {out} keeps the last good checkpoint" if (out / STATE).is_file() else ""
        raise NotFinite(f"{what}; learn slower, for example with --recipe '{slower(model, planned.chosen)}' and another"
                        f" --out{kept}") from None
    except (MemoryError, ModelError, OSError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(said in str(error) for said in REFUSED):
            raise
        raise OutOfMemory("there was no memory left to train with; give a --budget memory that is free, so that a"
                          " smaller way is chosen, and another --out") from None


def slower(model: Model, chosen: Forecast) -> str:
    """The recipe at a tenth of its learning rate."""
    rate = float(f"{chosen.plan.learning_rate / 10:.2g}")
    techniques = list(chosen.recipe)
    for i, technique in reversed(list(enumerate(techniques))):
        if "rate" in vars(technique):
            changed = Recipe(*techniques[:i], replace(technique, rate=rate), *techniques[i + 1 :])  # type: ignore[call-arg]
            if math.isclose(changed.plan(model).train.learning_rate, rate):
                return str(changed)
    return str(Recipe.parse(f"full(rate={rate!r}) + {chosen.recipe}"))
