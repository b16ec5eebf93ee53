"""A run: a model with a train plan becomes a trained model. Everything before and after the loop happens here.

    examples -> module in its computing dtype -> adaptation, saving, lean layers -> loop -> weights, difference

Training computes in bfloat16 where the machine gains by it; the trained numbers keep float32's precision beside it
(`precision`), and the weights that are written start from the stored ones, not from their bfloat16 rounding.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from fivefold.artifact import hash_folder, key
from fivefold.errors import DataError
from fivefold.files import sha256
from fivefold.model import ADAPTER, Model, TrainPlan
from fivefold.tokenizer import Tokenizer
from fivefold.training import attention, data, layer, lean
from fivefold.training.batching import Batch, Stream
from fivefold.training.checkpoint import Keeper
from fivefold.training.data import Examples
from fivefold.training.delta import Delta, Sparse, changed
from fivefold.training.loop import Fitted, Group, Hooks, Micro, Step, fit
from fivefold.training.method import Adaptation, Lesson, Methods, completed
from fivefold.training.module import computing_dtype, give_back, loss_of, packs, stored_name, write_trained
from fivefold.training.optimizer import Optimizer
from fivefold.training.shelf import Shelf
from fivefold.weights import StoredTensor, read_tensors

SCORED = 8_192
"""Held-out tokens a check looks at, at most."""
CHECKS, PILOT = 5, 3
MOST_STEPS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run leaves: the model, its loop's account, and the size of what was learned."""

    model: Model
    fitted: Fitted
    delta: Path
    delta_bytes: int
    numbers: int
    taken: dict[str, int]
    beside: bool = False


class Teaching(Protocol):
    """What is learned from batches, and how it is judged, where that is not the next token."""

    def loss(self, batch: Batch, /) -> torch.Tensor: ...

    def held_loss(self, batch: Batch, /) -> torch.Tensor: ...

    def batches(self, batches: Sequence[Batch], step: int) -> list[Batch]:
        """Those of 0-based `step`, given the text's own."""
        ...


class NextToken:
    def __init__(self, loss: Callable[[Batch], torch.Tensor]) -> None:
        self.loss = self.held_loss = loss

    def batches(self, batches: Sequence[Batch], step: int) -> list[Batch]:
        return list(batches)


@dataclass(frozen=True, eq=False)
class Taught:
    """A stream whose batches are made what `teaching` makes of them."""

    stream: Stream
    teaching: Teaching

    def step(self, number: int) -> list[Batch]:
        return self.teaching.batches(self.stream.step(number), number)

    def epoch(self, number: int) -> list[list[list[int]]]:
        return self.stream.epoch(number)


def examples_of(model: Model) -> tuple[Examples, Examples]:
    """(training part, held-out part) of the plan's data. Raises DataError."""
    plan = model.train
    if plan.data is None:
        raise DataError("there are no examples to train on; give --data")
    rows = data.read(plan.data, Tokenizer(model.tokenizer_file), model.blueprint.context, template=plan.template)
    return rows.split(plan.held_out)


def train(model: Model) -> Model:
    """The model after the run its plan describes, in a folder below `model.work`; the plan's methods are done."""
    import tempfile

    return run(model, model.work or Path(tempfile.mkdtemp(prefix="fivefold."))).model


def run(
    model: Model, folder: Path, *, keeper: Keeper | None = None, listen: Callable[[Step], None] = lambda step: None,
    parts: tuple[Examples, Examples] | None = None, planned: Callable[[TrainPlan], None] = lambda plan: None,
    enough: Callable[[], str] = lambda: "", teaching: Callable[[Lesson], Teaching] | None = None,
) -> Trained:
    """Train `model` by its plan; `folder` receives `trained/` (the weights) and `delta/` (what was learned).

    `keeper` makes checkpoints, and resumes from one. `planned` hears the plan with its number of steps, and `enough`
    says when to end before the last of them. `teaching` asks the module for something else than the next token.
    """
    train_part, held_part = parts or examples_of(model)
    model = model.but(train=completed(model.train))
    methods = Methods.of(model.train)
    adaptation = methods.adaptation
    assert adaptation is not None
    lesson = prepared(model, adaptation, methods, max(part.longest for part in (train_part, held_part)))
    optimizer = methods.update.optimizer(model.train) if methods.update else adaptation.default_optimizer()
    taught = teaching(lesson) if teaching else NextToken(loss_of(lesson.module, adaptation.hidden(lesson)))
    stream, loss = Taught(_stream(train_part, lesson.plan, adaptation, optimizer), taught), taught.loss
    begun = keeper.meta() if keeper is not None else None
    lesson.plan = plan = _with_steps(lesson, stream, loss, optimizer, begun["steps"] if begun else 0)
    planned(plan)
    adaptation.ready(lesson, loss, lambda step: _micro(stream.step(step)))
    shelf = methods.saving.shelf(lesson, folder) if methods.saving else None
    held = Stream(_some(held_part), plan.tokens_per_step, plan.at_once, plan.seed, plan.layout).batches()
    fitted = fit(
        plan, _groups(lesson, adaptation.rates(lesson)), loss, lambda step: _micro(stream.step(step)),
        lambda: _score(lesson.module, taught.held_loss, held), optimizer=optimizer, held=plan.held,
        fused=_fused(adaptation, optimizer), patience=plan.patience, keeper=keeper, checks=CHECKS,
        hooks=_hooks(adaptation, lesson, listen, shelf, enough), exact=lambda name: stored_value(lesson, name),
    )
    for left in ("trained", "delta") if keeper is not None and keeper.lasting else ():  # by a process that was killed
        shutil.rmtree(folder / left, ignore_errors=True)
    return _finished(model, folder, adaptation, lesson, fitted)


def prepared(model: Model, adaptation: Adaptation, methods: Methods, longest: int | None = None) -> Lesson:
    """The module with what is to be trained chosen, made lean, and in training mode.

    Its plan says "bucket" where examples of `longest` tokens (default: the context) cannot share a row.
    """
    plan = model.train
    dtype = adaptation.dtype(computing_dtype(plan.dtype))
    torch.manual_seed(plan.seed)
    module = adaptation.load(model, dtype)
    if plan.layout == "pack" and not packs(module, longest or model.blueprint.context):
        plan = replace(plan, layout="bucket")
    lesson = Lesson(model, module, plan)
    if adaptation.lean:
        attention.use(module)
    lesson.trained = adaptation.prepare(lesson)
    for parameter in lesson.trained.values():
        parameter.requires_grad_(True)
    if methods.saving:
        methods.saving.install(lesson)
    rooms: list[layer.Room] = []
    lesson.extra["taken"] = {"layer": layer.install(module, rooms), **lean.install(module)} if adaptation.lean else {}
    lesson.extra["rooms"] = rooms
    module.train()
    give_back()
    return lesson


def _fused(adaptation: Adaptation, optimizer: Optimizer) -> bool:
    return adaptation.fused and optimizer.needs_gradients


def _stream(part: Examples, plan: TrainPlan, adaptation: Adaptation, optimizer: Optimizer) -> Stream:
    at_once = 1 << 40 if _fused(adaptation, optimizer) else plan.at_once
    return Stream(part.rows, plan.tokens_per_step, at_once, plan.seed, plan.layout)


def _groups(lesson: Lesson, rates: Mapping[str, float]) -> list[Group]:
    return [Group(parameters={n: p for n, p in lesson.trained.items() if rates.get(n, 1.0) == rate}, rate=rate)
            for rate in sorted({rates.get(name, 1.0) for name in lesson.trained})]


def _micro(batches: list[Batch]) -> Micro:
    total = sum(batch.learned for batch in batches)
    return [(batch, batch.learned / total) for batch in batches]


def _with_steps(
    lesson: Lesson, stream: Taught, loss: Callable[[Batch], torch.Tensor], optimizer: Optimizer, begun: int = 0
) -> TrainPlan:
    """The plan with its number of steps: those given, or its rounds over the data, and what its time allows of them.

    A run that was begun keeps the number it was `begun` with: a step may take another time now.
    """
    plan = lesson.plan
    if begun and (plan.seconds or not plan.steps):
        return replace(plan, steps=begun)
    steps = plan.steps or max(1, math.ceil(plan.epochs * len(stream.epoch(0))))
    if plan.seconds:
        steps = max(1, min(steps, int(plan.seconds / _seconds_per_step(lesson, stream, loss, optimizer))))
    return replace(plan, steps=min(steps, MOST_STEPS))


def _seconds_per_step(
    lesson: Lesson, stream: Taught | Stream, loss: Callable[[Batch], torch.Tensor], optimizer: Optimizer
) -> float:
    """Of a typical step, from a few that change nothing; a fifth is added for updates, checks and checkpoints.

    No gradient outlives its own completion: the run itself may not have room for all of them.
    """
    spent = []
    drops = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in lesson.trained.values()]
    for number in range(PILOT):
        optimizer.begin(number + 1, lesson.trained, {})
        start = time.perf_counter()
        for batch in stream.step(number):
            if optimizer.needs_gradients:
                loss(batch).backward()
                continue
            for _ in range(2):
                with torch.no_grad():
                    loss(batch)
        spent.append(time.perf_counter() - start)
    for drop, parameter in zip(drops, lesson.trained.values(), strict=True):
        drop.remove()
        parameter.requires_grad_(True)
    return 1.2 * sorted(spent)[len(spent) // 2]


def _some(part: Examples) -> list[data.Example]:
    rows: list[data.Example] = []
    total = 0
    for row in sorted(part.rows, key=lambda row: row.digest):
        if rows and total + len(row.tokens) > SCORED:
            break
        rows.append(row)
        total += len(row.tokens)
    return rows


@torch.no_grad()
def _score(module: Any, loss: Callable[[Batch], torch.Tensor], batches: list[Batch]) -> float:
    training = module.training
    module.eval()
    try:
        total = sum(batch.learned for batch in batches)
        return sum(float(loss(batch)) * batch.learned / total for batch in batches)
    finally:
        module.train(training)


def _hooks(
    adaptation: Adaptation, lesson: Lesson, listen: Callable[[Step], None], shelf: Shelf | None,
    enough: Callable[[], str],
) -> Hooks:
    return Hooks(
        penalty=lambda step: adaptation.penalty(lesson, step),
        gradients=lambda step: adaptation.gradients(lesson, step),
        stepped=lambda step: adaptation.stepped(lesson, step),
        buffers=lambda: adaptation.buffers(lesson), listen=listen, phases=adaptation.phases(lesson),
        anew=lambda value: adaptation.anew(lesson, value), shelf=shelf or Shelf(), enough=enough,
    )


def stored_tensor(lesson: Lesson, name: str) -> StoredTensor:
    """On disk, what a parameter of the module was loaded from."""
    if "stored" not in lesson.extra:
        lesson.extra["stored"] = dict(read_tensors(lesson.model.path))
    stored: dict[str, StoredTensor] = lesson.extra["stored"]
    return stored[stored_name(lesson.module, stored, name)]


def stored_value(lesson: Lesson, name: str) -> torch.Tensor:
    """The float32 value on disk of a parameter of the module."""
    return torch.from_numpy(stored_tensor(lesson, name).numpy())


def _finished(
    model: Model, folder: Path, adaptation: Adaptation, lesson: Lesson, fitted: Fitted
) -> Trained:
    for room in lesson.extra["rooms"]:
        room.clear()
    give_back()
    delta = adaptation.result(lesson, fitted.value)
    sparse = _sparse(lesson, delta, hash_folder(model.path)) if delta.sparse else None
    weights = {name: partial(_with, sparse, stored_tensor(lesson, name)) if sparse and name in delta.sparse else make
               for name, make in delta.weights.items()}
    written = write_trained(lesson.module, model, weights, folder / "trained")
    size = delta.write(folder / "delta", sparse) + sum(stored_tensor(lesson, name).nbytes for name in delta.dense)
    if delta.beside:
        shutil.copytree(folder / "delta", written / ADAPTER)
    numbers, part = adaptation.numbers(lesson), adaptation.covered(lesson)
    done = model.but(
        path=written, origin=model.parent, train=replace(model.train, methods=(), data=None),
    ).covered(
        f"{adaptation.name}: {numbers:,} numbers trained{f' ({part})' if part else ''} in {fitted.steps} steps,"
        f" held-out loss {fitted.before:.4f} -> {fitted.after:.4f}, difference of {size:,} bytes"
    )
    return Trained(model=done, fitted=fitted, delta=folder / "delta", delta_bytes=size, numbers=numbers,
                   taken=lesson.extra["taken"], beside=delta.beside)


def _sparse(lesson: Lesson, delta: Delta, parent: str) -> Sparse:
    entries = {}
    for name in sorted(delta.sparse):
        stored = stored_tensor(lesson, name)
        entries[stored.name] = changed(stored.numpy(), delta.weights[name]().numpy())
    return Sparse(parent=parent, entries=entries)


def _with(sparse: Sparse, stored: StoredTensor) -> torch.Tensor:
    return torch.from_numpy(sparse.added(stored.name, stored.numpy()))


def run_key(model: Model) -> str:
    """What a checkpoint is bound to: model, data and plan."""
    from fivefold.model import plan_to_json

    assert model.train.data is not None
    plan = {k: v for k, v in plan_to_json(replace(model.train, steps=0)).items() if k != "data"}
    return key({"model": hash_folder(model.path), "data": sha256(model.train.data), "plan": plan})
