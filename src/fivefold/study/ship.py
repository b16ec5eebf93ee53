"""Ship: copy a trial's artifact, measure the copy again in its serving engine, write its card; refuse on departure.

The copy must be byte-identical (every SHA-256), answer as the trial did (agreement and KL are deterministic for the
same file, engine and tokens; a small tolerance is left for another thread order) and cost what the trial cost. Times
drift with the machine, so the copy and the stored artifact are measured in turn in the same minutes and their ratio
decides, not the number of yesterday.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fivefold.artifact import Artifact
from fivefold.errors import Departure, StoreError, UserError
from fivefold.model import Model
from fivefold.quantity import Measurement, Quantity
from fivefold.recipe import Recipe
from fivefold.study.trial import Outcome, Trial

ANSWERS = {"agreement": 0.005, "kl": 0.002, "loss": 0.002, "accuracy": 0.01}
"""Absolute tolerances on quality: what a different order of summation may change."""
COSTS = {"latency": 0.15, "ttft": 0.15, "memory": 0.10, "energy": 0.15}
"""Relative tolerances on resources, beyond the interval of the interleaved ratio."""
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """`rows`: metric -> (the quantity it is held against, the copy's, "same" or the measured ratio)."""

    folder: Path
    artifact: Artifact
    measurement: Measurement
    rows: Mapping[str, tuple[Quantity, Quantity, str]]
    held_against: str = "trial"


def ship(
    stored: Artifact, trial: Trial, to: Path, *, workload: Any, quality: Callable[[Model], Measurement],
    country: str = "world", meta: Mapping[str, Any] | None = None,
) -> Shipped:
    """Copy, measure, compare, seal. Raises StoreError (changed artifact, `to` exists), Departure (nothing is left)."""
    from fivefold.study.build import served

    if to.exists():
        raise StoreError(f"{to} already exists; give a new folder")
    recipe = Recipe.parse(trial.recipe)
    before = served(recipe, stored.model())
    copy = stored.write_copy(to, model=before, recipe=trial.recipe)
    try:
        copy.verify()
        measurement, ratios = _measured(before, copy.model(), workload, country)
        measurement = measurement.merged(quality(copy.model()))
        rows = departures(trial.measurement, measurement, ratios)
        shutil.rmtree(to)
        card = {**measurement.to_json(), "trial": trial.number, "recipe": trial.recipe, "study": dict(meta or {})}
        sealed = stored.write_copy(to, model=before, recipe=trial.recipe, card=card)
        sealed.verify()
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(to)
        raise
    return Shipped(folder=to, artifact=sealed, measurement=measurement, rows=rows)


def _measured(
    before: Model, after: Model, workload: Any, country: str
) -> tuple[Measurement, dict[str, Quantity]]:
    from fivefold.meters.interleaved import Interleaved, Job

    jobs = [Job(model=before, workload=workload, label="stored"), Job(model=after, workload=workload, label="copy")]
    with Interleaved(jobs, country=country) as pair:
        first, second = pair.run(ROUNDS)
        ratios = {name: pair.ratio(name, 1, 0) for name in COSTS if name != "memory"}
    if first.value("memory") and second["memory"].value:
        ratios["memory"] = second["memory"].scaled(1 / (first.value("memory") or 1.0), "1")
    return second, ratios


def departures(
    trial: Measurement, copy: Measurement, ratios: Mapping[str, Quantity]
) -> dict[str, tuple[Quantity, Quantity, str]]:
    """The rows to show; raises Departure naming every metric that departs. A metric that cannot be compared departs."""
    rows: dict[str, tuple[Quantity, Quantity, str]] = {}
    wrong = []
    for name, tolerance in ANSWERS.items():
        if name not in trial:
            continue
        a, b = trial[name], copy.get(name, Quantity.missing(trial[name].unit, "not measured"))
        gap = abs(b.value - a.value) if a.value is not None and b.value is not None else None
        good = gap is not None and gap <= tolerance
        rows[name] = (a, b, "same" if good else "DEPARTS")
        if not good:
            wrong.append(f"{name} {a.value} -> {b.value}")
    for name, tolerance in COSTS.items():
        ratio = ratios.get(name)
        if ratio is None or ratio.value is None or name not in trial:
            continue
        low, high = ratio.low or ratio.value, ratio.high or ratio.value
        good = low <= 1 + tolerance
        rows[name] = (trial[name], copy[name], f"{ratio.value:.2f}x of the stored one, in turn")
        if not good:
            wrong.append(f"{name} {ratio.value:.2f}x [{low:.2f}, {high:.2f}]")
    if wrong:
        raise Departure(
            f"the copy departs from trial in {'; '.join(wrong)}; nothing was shipped: measure again on a quiet machine"
            " or ship another trial"
        )
    return rows


def ship_trial(folder: Path, to: Path, *, budget: str = "", number: int | None = None) -> Shipped:
    """Ship a trial of the study in `folder`: the one given, else the recommendation under `budget`.

    Raises UserError for a trial without an artifact, Infeasible, StoreError, Departure.
    """
    from fivefold.artifact import Store
    from fivefold.budget import Budget
    from fivefold.model import load
    from fivefold.study.study import Study
    from fivefold.tokenizer import Tokenizer
    from fivefold.workload import Workload

    study = Study.open(folder)
    trial = _chosen(study, number) if number is not None else study.pick(Budget.parse(budget) if budget else None)
    if trial.artifact is None:
        raise UserError(f"trial {trial.number} ({trial.recipe}) has no artifact, it is the parent itself; pick another")
    inputs = study.meta["inputs"]
    with Store(folder / "artifacts").using(trial.artifact) as stored:
        traffic = Workload.load(inputs["workload"], Tokenizer(load(stored.path).tokenizer_file))
        return ship(
            stored, trial, to, workload=traffic, quality=lambda model: _quality(model, folder),
            country=inputs["country"], meta=study.meta.get("settings"),
        )


def _chosen(study: Any, number: int) -> Trial:
    trial: Trial | None = next((t for t in study.trials if t.number == number), None)
    if trial is None or trial.outcome is not Outcome.MEASURED:
        measured = ", ".join(str(t.number) for t in study.trials if t.outcome is Outcome.MEASURED)
        raise UserError(f"trial {number} was not measured, so it cannot be shipped; measured trials: {measured}")
    return trial


def _quality(model: Model, folder: Path) -> Measurement:
    from fivefold.engines import open_session
    from fivefold.study.quality import on_tasks
    from fivefold.tasks.fidelity import Reference, fidelity
    from fivefold.tokenizer import Tokenizer

    session = open_session(model)
    try:
        found = fidelity(session, Reference.load(folder / "reference-full.npz")).measurement
        return found.merged(on_tasks(folder, session, Tokenizer(model.tokenizer_file)))
    finally:
        session.close()
