"""Judging a fine-tuned model beside its parent, in the engine that serves it, on answers neither was trained on.

    loss       mean of -log p over the tokens of the held-out answers, and perplexity = exp(loss)
    accuracy   of the most likely label of each row, or of the choices of a named task

Both are paired: the same items for both models, the difference with its interval. What is asked is an `Exam`: it is set
before training, so that whatever is wrong with it is known before any work, and kept in the run's folder, so that a
shipped copy is asked the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fivefold.engines import Session, open_session
from fivefold.errors import DataError, NotFinite
from fivefold.model import Model
from fivefold.quantity import Measurement, Quantity
from fivefold.tasks import _intervals, choice
from fivefold.tasks.choice import MAX_CHOICES, Answers, ChoiceSet, Item
from fivefold.tasks.paired import Verdict, verdict
from fivefold.tokenizer import Tokenizer
from fivefold.training import data
from fivefold.training.data import Example, Examples

LARGEST = 700.0
"""exp of more has no float."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Exam:
    """`rows` whose answers' losses are taken, and what is `asked` as multiple choice. To answer all of it once,
    `tokens` are scored, at most `longest` together."""

    rows: tuple[Example, ...]
    asked: ChoiceSet | None
    tokens: int
    longest: int
    named: bool = False
    """Whether what is asked is a named task, and not the rows' labels."""

    @classmethod
    def set(cls, model: Model, held: Examples, task: str, test: Path | None, *, items: int, template: str) -> Self:
        """`held` are rows kept out of training; `test` a file of rows instead; `task` "accuracy" or a named set.

        Raises DataError for a label that training does not see, for rows that have none, and for what is longer than
        the context.
        """
        tokenizer, context = Tokenizer(model.tokenizer_file), model.blueprint.context
        rows = held
        if test is not None:
            rows = data.read(test, tokenizer, context, template=template, labels=held.labels or None)
        chosen = tuple(sorted(rows.rows, key=lambda row: row.digest)[:items])
        lengths = [len(row.tokens) for row in chosen]
        asked = _questions(rows, chosen, task, items)
        for number, item in enumerate(asked.items if asked else ()):
            for before, end in zip(item.contexts, item.continuations, strict=True):
                lengths.append(len(tokenizer.encode(before + end)))
                if lengths[-1] > context:
                    where = f"line {chosen[number].line} of {rows.source}" if _by_label(task) else f"an item of {task}"
                    raise DataError(f"{where} takes {lengths[-1]} tokens with the answer {end.strip()[:40]!r} and the"
                                    f" model's context is {context}; shorten it")
        return cls(rows=chosen, asked=asked, tokens=sum(lengths), longest=max(lengths), named=not _by_label(task))

    def __str__(self) -> str:
        rows = "one row" if len(self.rows) == 1 else f"{len(self.rows)} rows"
        return f"{rows}, and {len(self.asked.items)} of {self.asked.name}" if self.asked and self.named else rows

    def to_json(self) -> dict[str, Any]:
        rows = [{"tokens": row.tokens.tolist(), "learn": np.flatnonzero(row.learn).tolist(), "line": row.line}
                for row in self.rows]
        return {"rows": rows, "asked": self.asked.to_json() if self.asked else None, "tokens": self.tokens,
                "longest": self.longest, "named": self.named}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Self:
        rows = []
        for row in told["rows"]:
            learn = np.zeros(len(row["tokens"]), bool)
            learn[row["learn"]] = True
            rows.append(Example(np.array(row["tokens"], np.int64), learn, row["line"], b""))
        asked = ChoiceSet.from_json(told["asked"]) if told["asked"] else None
        return cls(rows=tuple(rows), asked=asked, tokens=told["tokens"], longest=told["longest"], named=told["named"])


def _by_label(task: str) -> bool:
    return task in ("", "accuracy")


def _questions(rows: Examples, chosen: Sequence[Example], task: str, items: int) -> ChoiceSet | None:
    """The rows as multiple choice when they are labelled, or the task named; None when neither."""
    if not _by_label(task):
        return choice.load(task, items)
    if task and not rows.labels:
        raise DataError(f"{rows.source} has no labels, so there is no accuracy; give rows with text and label, or leave"
                        " --task out")
    if task and len(rows.labels) > MAX_CHOICES:
        raise DataError(f"{rows.source} has {len(rows.labels)} labels and an accuracy is of {MAX_CHOICES} at most;"
                        " write such answers as prompt and completion")
    if not rows.labels or len(rows.labels) > MAX_CHOICES:
        return None
    asked = [Item.of(rows.template.replace("{text}", row.text), rows.labels, rows.labels.index(row.label))
             for row in chosen]
    return ChoiceSet(rows.source, tuple(asked), by_length=False)


@dataclass(frozen=True, eq=False)
class Answered:
    """What one model made of an exam: the losses of each row's answer by token, and its choices."""

    losses: tuple[NDArray[np.float64], ...]
    answers: Answers | None

    @property
    def measurement(self) -> Measurement:
        """Standard errors take the row as the unit."""
        each = np.concatenate(self.losses)
        where = np.repeat(np.arange(len(self.losses)), [len(part) for part in self.losses])
        loss = _intervals.mean(each, where, "nat/token")
        found = Measurement({"loss": loss, "perplexity": _exp(loss)})
        return found if self.answers is None else found.merged(self.answers.measurement)


def _exp(loss: Quantity) -> Quantity:
    value, low, high = (None if x is None or x > LARGEST else math.exp(x) for x in (loss.value, loss.low, loss.high))
    if value is None:
        return Quantity.missing("1", "too large for a number")
    return Quantity(value=value, unit="1", method="measured", n=loss.n, low=low, high=high, reason=loss.reason)


def answered(model: Model, exam: Exam) -> Answered:
    """Raises NotFinite when the model's probabilities are not numbers."""
    run = replace(model.run, context=max(model.run.context, exam.longest))
    session, tokenizer = open_session(model.but(run=run)), Tokenizer(model.tokenizer_file)
    try:
        losses = tuple(row_losses(session, row) for row in exam.rows)
        return Answered(losses, choice.answer(session, tokenizer, exam.asked) if exam.asked else None)
    finally:
        session.close()


def row_losses(session: Session, row: Example) -> NDArray[np.float64]:
    """-log p of each token of the answer."""
    scored: Any = session.score([int(t) for t in row.tokens[:-1]])
    where = np.flatnonzero(row.learn[1:])
    losses = -scored[where, row.tokens[where + 1]].astype(np.float64)
    if not np.isfinite(losses).all():
        raise NotFinite(f"the model gives the answer of line {row.line} a probability that is not a number; check its"
                        " weights")
    return losses


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The parent's and the artifact's numbers on the same items; `verdict` is on accuracy where there is one, else on
    the loss, None for a single item."""

    parent: Measurement
    card: Measurement
    verdict: Verdict | None
    items: str


def judge(parent: Model, trained: Model, exam: Exam) -> Judged:
    first, second = answered(parent, exam), answered(trained, exam)
    decided: Verdict | None = None
    if first.answers is not None and second.answers is not None:
        if len(first.answers.right) > 1:
            decided = verdict(first.answers.correct, second.answers.correct, 0.0)
    elif len(exam.rows) > 1:
        decided = verdict(_means(first), _means(second), 0.0, better="lower")
    return Judged(parent=first.measurement, card=second.measurement, verdict=decided, items=str(exam))


def _means(found: Answered) -> NDArray[np.float64]:
    return np.array([part.mean() for part in found.losses])
