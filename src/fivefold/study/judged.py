"""Judging a fine-tuned model beside its parent, in the engine that serves it, on answers neither was trained on.

    loss       mean of -log p over the tokens of the held-out answers, and perplexity = exp(loss)
    accuracy   of the most likely label of each row (or of a named task's choices)

Both are paired: the same items for both models, the difference with its interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivefold.engines import Session, open_session
from fivefold.errors import NotFinite
from fivefold.model import Model
from fivefold.quantity import Measurement, Quantity
from fivefold.tasks import _intervals, choice
from fivefold.tasks.choice import Answers, ChoiceSet, Item
from fivefold.tasks.paired import Verdict, verdict
from fivefold.tokenizer import Tokenizer
from fivefold.training import data
from fivefold.training.data import Example, Examples


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The parent's and the artifact's numbers on the same items; `verdict` is on accuracy where there is one."""

    parent: Measurement
    card: Measurement
    verdict: Verdict | None
    items: str


def judge(
    parent: Model, trained: Model, held: Examples, task: str, test: Path | None, *, items: int, template: str
) -> Judged:
    """`held` are rows kept out of training; `test` a file of rows instead; `task` "accuracy" or a named set."""
    tokenizer = Tokenizer(parent.tokenizer_file)
    rows = held
    if test is not None:
        rows = data.read(test, tokenizer, parent.blueprint.context, template=template, labels=held.labels or None)
    chosen = sorted(rows.rows, key=lambda row: row.digest)[:items]
    asked = questions(rows, chosen, task, items)
    first = _answered(parent, tokenizer, chosen, asked)
    second = _answered(trained, tokenizer, chosen, asked)
    decided: Verdict | None = None
    if first[1] is not None and second[1] is not None:
        decided = verdict(first[1].correct, second[1].correct, 0.0)
    elif len(chosen) > 1:
        decided = verdict(_means(first[0]), _means(second[0]), 0.0, better="lower")
    described = f"{len(chosen)} rows" + (f", {asked.name} of {len(asked.items)}" if asked else "")
    return Judged(parent=_measured(*first), card=_measured(*second), verdict=decided, items=described)


def questions(rows: Examples, chosen: Sequence[Example], task: str, items: int) -> ChoiceSet | None:
    """The rows as multiple choice when they are labelled, or the task named; None when neither."""
    if task and task != "accuracy":
        return choice.load(task, items)
    if not rows.labels:
        return None
    asked = [Item.of(rows.template.replace("{text}", row.text), rows.labels, rows.labels.index(row.label))
             for row in chosen]
    return ChoiceSet(rows.source, tuple(asked), by_length=False)


def _answered(
    model: Model, tokenizer: Tokenizer, rows: Sequence[Example], asked: ChoiceSet | None
) -> tuple[list[NDArray[np.float64]], Answers | None]:
    session = open_session(model)
    try:
        losses = [row_losses(session, row) for row in rows]
        return losses, choice.answer(session, tokenizer, asked) if asked else None
    finally:
        session.close()


def row_losses(session: Session, row: Example) -> NDArray[np.float64]:
    """-log p of each token of the answer."""
    scored: Any = session.score([int(t) for t in row.tokens[:-1]])
    where = np.flatnonzero(row.learn[1:])
    losses = -scored[where, row.tokens[where + 1]].astype(np.float64)
    if not np.isfinite(losses).all():
        raise NotFinite(f"the model gives the answer of line {row.line} a probability that is not a number")
    return losses


def _means(losses: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.array([part.mean() for part in losses])


def _measured(losses: Sequence[NDArray[np.float64]], answers: Answers | None) -> Measurement:
    """Standard errors take the row as the unit."""
    each = np.concatenate(losses)
    value = float(each.mean())
    where = np.repeat(np.arange(len(losses)), [len(part) for part in losses])
    error, count = _intervals.clustered_error(each, where)
    half = _intervals.student95(count - 1) * error if count > 1 else math.nan
    known = count > 1
    loss = Quantity(value=value, unit="nat/token", method="measured", n=len(each), low=value - half if known else None,
                    high=value + half if known else None)
    perplexity = Quantity(value=math.exp(value), unit="1", method="measured", n=len(each),
                          low=math.exp(value - half) if known else None, high=math.exp(value + half) if known else None)
    found = Measurement({"loss": loss, "perplexity": perplexity})
    return found if answers is None else found.merged(answers.measurement)
