"""Quality: how a model of a study answers, against its parent's recorded answers.

Always fidelity on held-out text (`tasks.fidelity`). With tasks named by the user also multiple choice: every trial
answers the same items in its serving engine, so that accuracy is paired with the parent's and McNemar's test can say
whether they differ (`tasks.paired`); loyalty, flips and the calibration of the choices come with it. Items of several
tasks are pooled: accuracy is the share of all items, and the context holds each task's own. An attack
(`tasks.robustness`) asks a hundred times as often, so no trial is attacked: `measure` and `compare` do it when told to.

Two files lie in the study's folder: `questions.json` (the items as they were chosen, so that a resumed study asks the
same) and `answers.json` (the parent's).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fivefold.engines import Session
from fivefold.errors import DataError, UserError
from fivefold.files import write_text
from fivefold.quantity import Measurement
from fivefold.study.pareto import ASIDE, ON_TASKS, Goal
from fivefold.tasks.choice import Answers, ChoiceSet, answer, joined, load
from fivefold.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fivefold.tasks.robustness import Attack

QUESTIONS, ANSWERS = "questions.json", "answers.json"


def questions(tasks: Sequence[str], items: int) -> tuple[ChoiceSet, ...]:
    """`items` of each task: a set's name or a .jsonl file. Raises DataError."""
    sets = tuple(load(task, items) for task in dict.fromkeys(tasks))
    names = [s.name for s in sets]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise DataError(f"two tasks are called {twice!r}; rename one of the files")
    return sets


def check(goal: Goal, sets: Sequence[ChoiceSet]) -> None:
    """Raises UserError when the goal speaks of what a study does not measure, or of a task's metric without a task."""
    if aside := [m for m in goal.metrics if m in ASIDE]:
        raise UserError(f"{aside[0]} is not measured in a study, because {ASIDE[aside[0]]}")
    if not sets and (wanted := [m for m in goal.metrics if m in ON_TASKS]):
        raise UserError(f"{wanted[0]} is measured on a task and none was named; add --task piqa, or a .jsonl file")


def spelled(sets: Sequence[ChoiceSet]) -> str:
    """What identifies the questions: name, number of items and digest of each set."""
    return ", ".join(f"{s.name} ({len(s.items)} items, {s.digest})" for s in sets)


def tokens(sets: Sequence[ChoiceSet], tokenizer: Tokenizer) -> int:
    """Tokens that are scored to answer everything once."""
    texts = (c + end for s in sets for i in s.items for c, end in zip(i.contexts, i.continuations, strict=True))
    return sum(len(tokenizer.encode(text)) for text in texts)


def keep(folder: Path, sets: Sequence[ChoiceSet]) -> None:
    """Write the questions; of a study without tasks nothing."""
    if sets:
        write_text(folder / QUESTIONS, json.dumps([s.to_json() for s in sets]))


def record(folder: Path, session: Session, tokenizer: Tokenizer) -> None:
    """The parent's answers."""
    found = [answer(session, tokenizer, s) for s in _questions(folder)]
    write_text(folder / ANSWERS, json.dumps([a.to_json() for a in found]))


def on_tasks(folder: Path, session: Session | None, tokenizer: Tokenizer) -> Measurement:
    """What `scored` gives; without a session that of the parent. Empty when the study has no task."""
    sets = _questions(folder)
    if not sets:
        return Measurement({})
    base = [Answers.from_json(a) for a in _read(folder / ANSWERS)]
    return scored(base if session is None else [answer(session, tokenizer, s) for s in sets], base)


def scored(found: Sequence[Answers], base: Sequence[Answers] | None = None) -> Measurement:
    """Pooled accuracy and choice_ece, each task's accuracy in the context; against `base` also loyalty, flips and
    McNemar's p-value."""
    from fivefold.tasks.calibration import of_choices
    from fivefold.tasks.flips import flips
    from fivefold.tasks.loyalty import loyalty
    from fivefold.tasks.paired import mcnemar

    each = {a.name: {"accuracy": float(a.correct.mean()), "items": len(a.correct)} for a in found}
    pooled = joined(found)
    context: dict[str, Any] = {"task": pooled.name, "items": pooled.digest, "tasks": each}
    sure = of_choices(pooled)
    measured, context = pooled.measurement.merged(sure), {**context, **sure.context}
    if base is None:
        return Measurement(measured.quantities, context)
    parent = joined(base)
    moved = flips(parent, pooled).measurement
    context |= {**moved.context, "mcnemar_p": mcnemar(parent.correct, pooled.correct)}
    return Measurement(measured.merged(loyalty(parent, pooled)).merged(moved).quantities, context)


def attacked(session: Session, tokenizer: Tokenizer, sets: Sequence[ChoiceSet]) -> Attack:
    """The attack on all sets, their items side by side."""
    from fivefold.tasks.robustness import attack, joined

    return joined([attack(session, tokenizer, s) for s in sets])


def victims(tasks: Sequence[str], count: int) -> tuple[ChoiceSet, ...]:
    """The first `count` items of each task, which are to be attacked; none for 0. Raises UserError, DataError."""
    if count < 0:
        raise UserError(f"{count} items cannot be attacked; give the number of items, or 0 for no attack")
    if count and not tasks:
        raise UserError("an attack edits the questions of a labelled task and none was named; add --task sst2")
    return questions(tasks, count) if count else ()


def _questions(folder: Path) -> list[ChoiceSet]:
    return [ChoiceSet.from_json(s) for s in _read(folder / QUESTIONS)] if (folder / QUESTIONS).is_file() else []


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{path} is gone or incomplete; run the same command again, it is made anew") from None
    return found
