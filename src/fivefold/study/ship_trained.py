"""Ship a fine-tuned model: copy it, ask the copy what the run's model was asked, write its card; refuse on departure.

The copy must be byte-identical (every SHA-256) and answer as recorded: loss and accuracy are deterministic for the same
file, engine and tokens; the tolerance of `ship` is left for another order of summation.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from pathlib import Path

from fivefold.artifact import Artifact
from fivefold.errors import Departure, StoreError, UserError
from fivefold.quantity import Measurement, Quantity
from fivefold.study.judged import answered
from fivefold.study.run_folder import MODEL, RUN, exam_of
from fivefold.study.ship import ANSWERS, Shipped


def is_run(folder: Path) -> bool:
    """Whether it is the folder of a training run."""
    return (folder / RUN).is_file()


def ship_run(folder: Path, to: Path) -> Shipped:
    """Ship the model of the run in `folder`. Raises UserError when it is not finished, StoreError (changed artifact,
    `to` exists), Departure (nothing is left)."""
    if not (folder / MODEL).is_dir():
        raise UserError(f"the run in {folder} is not finished; repeat its fivefold train command first")
    if to.exists():
        raise StoreError(f"{to} already exists; give a new folder")
    stored, exam = Artifact.open(folder / MODEL), exam_of(folder)
    if stored.card is None:
        raise StoreError(f"{stored.path} has no card.json, so there is nothing to hold a copy against; train again")
    recorded = Measurement.from_json({k: stored.card[k] for k in ("quantities", "context")})
    copy = stored.write_copy(to)
    try:
        measured = answered(copy.model(), exam).measurement
        rows = departures(recorded, measured)
        shutil.rmtree(to)
        readme = (stored.path / "README.md").read_text(encoding="utf-8")
        sealed = stored.write_copy(to, card={**stored.card, **measured.to_json()}, readme=readme)
        sealed.verify()
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(to)
        raise
    return Shipped(folder=to, artifact=sealed, measurement=measured, rows=rows, held_against="run")


def departures(recorded: Measurement, measured: Measurement) -> dict[str, tuple[Quantity, Quantity, str]]:
    """The rows to show; raises Departure naming every metric that departs."""
    rows: dict[str, tuple[Quantity, Quantity, str]] = {}
    wrong = []
    for name, before in recorded.items():
        after = measured[name]
        if name not in ANSWERS:
            rows[name] = (before, after, "")
            continue
        a, b = (math.inf if q.value is None else q.value for q in (before, after))
        good = abs(b - a) <= ANSWERS[name]
        rows[name] = (before, after, "same" if good else "DEPARTS")
        if not good:
            wrong.append(f"{name} {before.value} -> {after.value}")
    if wrong:
        raise Departure(f"the copy departs from the run's model in {'; '.join(wrong)}; nothing was shipped: check the"
                        " installation, then ship again or train again")
    return rows
