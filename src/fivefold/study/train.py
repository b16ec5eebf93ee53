"""Train: from a model, examples and a budget to a fine-tuned artifact, with what it took.

    read the examples -> forecast every way of fine-tuning, choose -> train, metered -> export, judge -> seal

Everything of a run lies in its folder: `run.json` (what was asked, forecast and chosen), `log.jsonl` (a line per step,
costs included), the checkpoint while it runs, and `model/`, the artifact: a model like any other for `measure`,
`compare`, `serve` and `optimize`. The same command goes on with a run that was stopped, and loses at most a minute.
One process works on a run; its memory is watched against the budget, because a forecast is not a promise.

The artifact is judged in the engine that serves it: the log-loss of the held-out answers, and for labelled rows the
accuracy of the most likely label, both paired with the parent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fivefold.artifact import Artifact, Made, hash_folder, key, seal, source_hash, versions
from fivefold.budget import TrainingBudget
from fivefold.errors import Busy, DataError, NotFinite, OutOfMemory, StoreError, UserError
from fivefold.files import atomic_folder, if_free, remove_partial, sha256, write_text
from fivefold.machine import Machine
from fivefold.meters.ledger import Cost, metered
from fivefold.meters.memory import PeakMemory
from fivefold.meters.money import Prices
from fivefold.metrics import show
from fivefold.model import Model, TrainPlan, Trait, plan_to_json
from fivefold.quantity import Measurement, Quantity
from fivefold.recipe import Recipe
from fivefold.study.forecast import Forecast, Surroundings, choose, forecast, ways
from fivefold.study.judged import Judged, judge
from fivefold.training.data import Examples

RUN, LOG, MODEL = "run.json", "log.jsonl", "model"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step: its loss, tokens/s since the run went on, and what the whole run took so far; J and USD may be None."""

    step: int
    steps: int
    loss: float
    score: float | None
    seconds: float
    tokens_per_second: float
    memory: int
    joules: float | None
    usd: float | None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What was forecast and what was chosen; `resumed` steps are done already."""

    forecasts: tuple[Forecast, ...]
    chosen: Forecast
    budget: TrainingBudget
    rows: int
    held_out: int
    tokens: int
    resumed: bool = False


@dataclass(frozen=True, kw_only=True)
class Finished:
    """`peak` is of the training process; `judged` has the parent and the artifact on the same items."""

    folder: Path
    artifact: Artifact
    recipe: str
    steps: int
    numbers: int
    delta_bytes: int
    before: float
    after: float
    cost: Cost
    predicted_peak: float
    judged: Judged
    stopped: str = ""


Listener = Callable[[Progress | Planned | str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asked for; see `verbs.train`."""

    model: Model
    data: Path
    out: Path
    budget: TrainingBudget
    recipe: str = ""
    task: str = ""
    test: Path | None = None
    template: str = TrainPlan.template
    epochs: float = 1.0
    steps: int = 0
    tokens_per_step: int = 1024
    patience: int = 0
    items: int = 200
    seed: int = 0
    country: str = "world"


def train(request: Request, listen: Listener = lambda event: None) -> Finished:
    """Raises UserError for what is wrong with the request, Infeasible when no way fits, NotFinite when the loss breaks
    (the last checkpoint stays), OutOfMemory when the run exceeds its memory, Busy when another process works on it."""
    request.out.mkdir(parents=True, exist_ok=True)
    with if_free(request.out / ".lock") as free:
        if not free:
            raise Busy(f"another process trains in {request.out}; wait for it or give another --out")
        return _train(request, listen)


def _train(request: Request, listen: Listener) -> Finished:
    if (request.out / MODEL).exists():
        raise StoreError(f"{request.out / MODEL} is there already; give another --out, or remove it to train again")
    machine, prices = Machine.load(), Prices.load()
    model, parts = _prepared(request)
    planned = _plan(request, model, parts, machine, prices)
    listen(planned)
    told = {"request": _identity(request), "chosen": str(planned.chosen.recipe), "plan": _plain(planned.chosen.plan),
            "predicted": asdict(planned.chosen.needs) if planned.chosen.needs else None}
    _same_run(request.out, told)
    write_text(request.out / RUN, json.dumps(told, indent=1) + "\n")
    from fivefold.training.checkpoint import Keeper
    from fivefold.training.run import run, run_key

    ready = model.but(train=planned.chosen.plan, work=request.out)
    window = metered(machine=machine, prices=prices)
    with _naming_a_way_out(request), window, PeakMemory() as memory:
        listener = _Watch(request, planned, window, memory, listen)
        done = run(ready, _clean(request.out / "work"), parts=parts, listen=listener,
                   keeper=Keeper(request.out, run_key(ready)))
    listen("measuring in the serving engine")
    cost = listener.before + window.cost
    artifact, judged = _sealed(request, planned, done, cost, parts[1])
    _clean(request.out / "work", make=False)
    for left in ("checkpoint.safetensors", "best.safetensors"):
        (request.out / left).unlink(missing_ok=True)
    assert planned.chosen.needs is not None
    return Finished(
        folder=request.out, artifact=artifact, recipe=str(planned.chosen.recipe), steps=done.fitted.steps,
        numbers=done.numbers, delta_bytes=done.delta_bytes, before=done.fitted.before, after=done.fitted.after,
        cost=cost, predicted_peak=planned.chosen.needs.peak, judged=judged, stopped=done.fitted.stopped,
    )


def _prepared(request: Request) -> tuple[Model, Any]:
    from fivefold.training.run import examples_of

    model = request.model
    if model.format != "safetensors" or Trait.TRAINABLE not in model.traits:
        raise UserError(f"{model.name} cannot be trained, it is quantized; give the float folder it came from")
    plan = replace(
        model.train, data=request.data.expanduser().resolve(), template=request.template, epochs=request.epochs,
        steps=request.steps, tokens_per_step=request.tokens_per_step, patience=request.patience, seed=request.seed,
        methods=(),
    )
    model = model.but(train=plan)
    parts = examples_of(model)
    if request.task == "accuracy" and not parts[0].labels:
        raise DataError(f"{request.data.name} has no labels, so there is no accuracy; give rows with text and label, or"
                        " leave --task out")
    return model, parts


def _plan(request: Request, model: Model, parts: Any, machine: Machine, prices: Prices) -> Planned:
    from fivefold.training.module import computing_dtype

    train_part, held_part = parts
    around = Surroundings(
        model=model, examples=train_part, budget=request.budget, machine=machine, prices=prices,
        process=float(_resident()), element=computing_dtype(model.train.dtype).itemsize,
    )
    found = [forecast(recipe, around) for recipe in ways(request.recipe)]
    return Planned(
        forecasts=tuple(found), chosen=choose(found, request.budget), budget=request.budget, rows=len(train_part),
        held_out=len(held_part), tokens=train_part.tokens, resumed=(request.out / LOG).is_file(),
    )


def _resident() -> int:
    """Bytes this process holds with the libraries of training in it."""
    import psutil
    import transformers.models.auto.modeling_auto  # noqa: F401

    return int(psutil.Process().memory_info().rss)


def _identity(request: Request) -> dict[str, Any]:
    """What makes a run this run, as JSON."""
    names = ("recipe", "task", "template", "epochs", "steps", "tokens_per_step", "patience", "items", "seed")
    return {
        "model": hash_folder(request.model.path), "data": sha256(request.data.expanduser()),
        "budget": asdict(request.budget), "test": str(request.test) if request.test else None,
        **{name: getattr(request, name) for name in names},
    }


def _same_run(folder: Path, told: Mapping[str, Any]) -> None:
    file = folder / RUN
    if not file.is_file():
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["request"]
    except (ValueError, KeyError, OSError, TypeError):
        raise StoreError(f"{file} is damaged; remove {folder} and run again") from None
    odd = sorted(k for k, v in told["request"].items() if before.get(k) != v)
    if odd:
        raise StoreError(f"{folder} holds a run with another {', '.join(odd)}; give another --out, or repeat the"
                         " command that began it")


def _plain(plan: TrainPlan) -> dict[str, Any]:
    return {k: v for k, v in plan_to_json(plan).items() if k != "data"}


def _clean(folder: Path, make: bool = True) -> Path:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    if make:
        folder.mkdir(parents=True)
    return folder


@contextmanager
def _naming_a_way_out(request: Request) -> Any:
    """The loop's failures with what to try next."""
    try:
        yield
    except NotFinite as error:
        kept = " The last good checkpoint is kept." if (request.out / "checkpoint.safetensors").is_file() else ""
        raise NotFinite(f"{error}, or train in another precision (held=\"split\").{kept}") from None
    except MemoryError:
        raise OutOfMemory("training could not allocate memory; give a smaller --budget memory, so that a smaller way is"
                          " chosen") from None


class _Watch:
    """Hears each step: writes the log, watches the memory, tells the listener."""

    def __init__(
        self, request: Request, planned: Planned, window: metered, memory: PeakMemory, listen: Listener
    ) -> None:
        self.request, self.planned, self.window, self.memory, self.listen = request, planned, window, memory, listen
        self.before, self.done = _earlier(request.out)
        self.log = (request.out / LOG).open("a", encoding="utf-8")
        self.first: tuple[int, float] | None = None

    def __call__(self, step: Any) -> None:
        joules, usd = self.window.so_far()
        peak = self.memory.so_far()
        if self.first is None:
            self.first = (step.step - 1, step.seconds)
        span = step.seconds - self.first[1]
        speed = (step.step - 1 - self.first[0]) * self.request.tokens_per_step / span if span > 0 else 0.0
        both = [None if q.value is None else q.value + (b.value or 0.0)
                for q, b in ((joules, self.before.energy), (usd, self.before.money))]
        told = Progress(step=step.step, steps=step.steps, loss=step.loss, score=step.score, seconds=step.seconds,
                        tokens_per_second=speed, memory=peak, joules=both[0], usd=both[1])
        self.log.write(json.dumps(asdict(told)) + "\n")
        self.log.flush()
        self.listen(told)
        limit = self.planned.budget.memory
        if limit is not None and peak > limit:
            raise OutOfMemory(
                f"training with {self.planned.chosen.recipe} took {show(peak, 'byte')} of the {show(limit, 'byte')}"
                f" allowed ({show(self.planned.chosen.needs.peak if self.planned.chosen.needs else 0, 'byte')} were"
                " forecast); allow more, or choose a smaller way with --recipe"
            )


def _earlier(folder: Path) -> tuple[Cost, int]:
    """What earlier processes of this run took, from the last line of its log, and their steps."""
    last: dict[str, Any] = {}
    if (folder / LOG).is_file():
        for line in (folder / LOG).read_text(encoding="utf-8").splitlines():
            try:
                last = json.loads(line)
            except ValueError:  # the line a killed process was writing
                continue
    cost = Cost.nothing()
    if not last:
        return cost, 0
    known = {"seconds": ("s", last["seconds"]), "energy": ("J", last["joules"]), "money": ("USD", last["usd"]),
             "memory": ("byte", last["memory"])}
    found = {name: Quantity(value=value, unit=unit, method="modelled" if name in ("energy", "money") else "measured")
             for name, (unit, value) in known.items() if value is not None}
    return Cost.of({**cost.quantities(), **found}), int(last["step"])


def _sealed(
    request: Request, planned: Planned, done: Any, cost: Cost, held: Examples
) -> tuple[Artifact, Judged]:
    """The artifact in `out/model`, judged as it will be served: weights, difference, recipe, card."""
    import shutil

    from fivefold.export import export

    target = request.out / MODEL
    remove_partial(target)
    traits = request.model.traits - ({Trait.PLAIN_GRAPH} if done.beside else set())
    recipe = str(planned.chosen.recipe)
    technique_code = [source_hash(type(t)) for t in Recipe.parse(recipe)]
    with atomic_folder(target) as work:
        written = export(done.model.but(traits=traits), work)
        judged = judge(request.model, written, held, request.task, request.test, items=request.items,
                       template=request.template)
        shutil.copytree(done.delta, work / "delta")
        facts = {
            "made": {n: q.to_json() for n, q in cost.quantities().items()}, "parent": {"name": request.model.name},
            "data": {"sha256": sha256(request.data.expanduser()), "rows": planned.rows}, "seed": request.seed,
            "versions": versions("fivefold", "torch", "transformers", "peft"), "coverage": list(written.coverage),
            "numbers": done.numbers, "delta_bytes": done.delta_bytes,
            "losses": [round(x, 5) for x in done.fitted.losses], "held_out": list(done.fitted.history),
        }
        made = Made(model=written, recipe=recipe, seconds=cost.seconds.value or 0.0, facts=facts,
                    card=judged.card.to_json())
        seal(work, made, key({"request": _identity(request), "code": technique_code}), _readme(request, recipe, judged))
    return Artifact.open(target), judged


def _readme(request: Request, recipe: str, judged: Judged) -> str:
    lines = [f"# {request.model.name}, fine-tuned", "", f"Made by Fivefold with `{recipe}` on {request.data.name}.", ""]
    lines += ["| metric | parent | this model |", "|---|---|---|"]
    for name, q in judged.card.items():
        before = judged.parent.get(name)
        shown = "-" if before is None else show(before.value, before.unit)
        lines.append(f"| {name} | {shown} | {show(q.value, q.unit)} |")
    return "\n".join([*lines, "", f"{judged.verdict}" if judged.verdict else "", ""])


def judged_again(folder: Path) -> Measurement:
    """The card of a trained artifact, for `ship`."""
    card = Artifact.open(folder).card
    if card is None:
        raise StoreError(f"{folder} has no card; train again")
    return Measurement.from_json(card)


os.environ.setdefault("HF_HUB_OFFLINE", "1")
