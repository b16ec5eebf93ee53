"""Sealing a fine-tuned model: exported, judged as it will be served, with its difference, its card and its costs."""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fivefold.artifact import Artifact, Made, key, seal, source_hash, versions
from fivefold.files import atomic_folder, remove_partial, sha256
from fivefold.meters.ledger import Cost
from fivefold.metrics import show
from fivefold.model import Model, TrainPlan, Trait
from fivefold.recipe import Recipe
from fivefold.study.judged import Exam, Judged, judge
from fivefold.study.request import Finished, Planned, Request
from fivefold.study.run_folder import MODEL
from fivefold.training.module import give_back

if TYPE_CHECKING:
    from fivefold.training.run import Trained


@dataclass(frozen=True, kw_only=True)
class Left:
    """What training leaves, without the memory it was done in."""

    model: Model
    delta: Path
    delta_bytes: int
    numbers: int
    beside: bool
    steps: int
    before: float
    after: float
    losses: tuple[float, ...]
    history: tuple[tuple[int, float], ...]
    stopped: str


def left(done: Trained) -> Left:
    fitted = done.fitted
    return Left(
        model=done.model, delta=done.delta, delta_bytes=done.delta_bytes, numbers=done.numbers, beside=done.beside,
        steps=fitted.steps, before=fitted.before, after=fitted.after, losses=fitted.losses, history=fitted.history,
        stopped=fitted.stopped,
    )


def sealed(request: Request, planned: Planned, done: Left, cost: Cost, exam: Exam) -> Finished:
    """The artifact in `out/model`: a model like a fresh one, but for an adapter that lies beside its weights."""
    from fivefold.export import export

    gc.collect()
    give_back()
    target, recipe = request.out / MODEL, str(planned.chosen.recipe)
    traits = request.model.traits - ({Trait.PLAIN_GRAPH} if done.beside else set())
    remove_partial(target)
    with atomic_folder(target) as work:
        written = export(done.model.but(traits=traits), work).but(origin=None, train=TrainPlan())
        judged = judge(request.model, written, exam)
        (work / "delta").mkdir()
        for file in done.delta.iterdir():
            shutil.copyfile(file, work / "delta" / file.name)
        code = [source_hash(type(technique)) for technique in Recipe.parse(recipe)]
        made = Made(model=written, recipe=recipe, seconds=cost.seconds.value or 0.0,
                    facts=_facts(request, planned, done, cost, written), card=card(judged))
        seal(work, made, key({"request": request.identity, "code": code}), readme(request, recipe, judged, cost))
    assert planned.chosen.needs is not None
    return Finished(
        folder=request.out, artifact=Artifact.open(target), recipe=recipe, steps=done.steps, numbers=done.numbers,
        delta_bytes=done.delta_bytes, before=done.before, after=done.after, cost=cost,
        predicted_peak=planned.chosen.needs.peak, judged=judged, stopped=done.stopped,
    )


def _facts(request: Request, planned: Planned, done: Left, cost: Cost, written: Model) -> dict[str, Any]:
    return {
        "made": {n: q.to_json() for n, q in cost.quantities().items()}, "parent": {"name": request.model.name},
        "data": {"sha256": sha256(request.data.expanduser()), "rows": planned.rows, "held out": planned.held_out},
        "seed": request.seed, "versions": versions("fivefold", "torch", "transformers", "peft"),
        "coverage": list(written.coverage), "numbers": done.numbers, "delta_bytes": done.delta_bytes,
        "losses": [round(x, 5) for x in done.losses], "held_out": list(done.history), "stopped": done.stopped,
    }


def card(judged: Judged) -> dict[str, Any]:
    """The artifact's measurements, with its parent's on the same items."""
    said = {"items": judged.items, "parent": judged.parent.to_json()["quantities"]}
    return {**judged.card.to_json(), **said, **({"verdict": str(judged.verdict)} if judged.verdict else {})}


def readme(request: Request, recipe: str, judged: Judged, cost: Cost) -> str:
    lines = [f"# {request.model.name}, fine-tuned", "", f"Made by Fivefold with `{recipe}` on {request.data.name}.", ""]
    lines += [f"| on {judged.items} | parent | this model |", "|---|---|---|"]
    for name, q in judged.card.items():
        before = judged.parent.get(name)
        lines.append(f"| {name} | {show(before.value, before.unit) if before else '-'} | {show(q.value, q.unit)} |")
    lines += ["", f"Against the parent: {judged.verdict}."] if judged.verdict else []
    took = {n: cost.quantities()[n] for n in ("seconds", "energy", "money", "memory")}
    lines += ["", "To make: " + ", ".join(f"{n} {show(q.value, q.unit)} ({q.method})" for n, q in took.items()) + "."]
    return "\n".join([*lines, "", "`delta/` is what was learned, for whoever has the parent.", ""])
