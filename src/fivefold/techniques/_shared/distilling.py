"""What both ways of distillation share: when they are refused, the texts, the train plan, the run and what it tells.

The student is a smaller model made from its parent, such as one with fewer layers; all its weights are trained by the
one loop, in the memory `full` takes (or a low-rank adapter, as `lora` does), and the state that is nearest to the
teacher on held-out text is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fivefold.errors import DataError, Misfit
from fivefold.files import sha256
from fivefold.model import Blueprint, Model, TrainPlan, Trait, blueprint_of, read_config
from fivefold.recipe import make

if TYPE_CHECKING:
    from fivefold.training.data import Example, Examples
    from fivefold.training.method import Lesson
    from fivefold.training.run import Teaching, Trained

NEEDS = frozenset({Trait.FLOAT_WEIGHTS, Trait.DENSE_WEIGHTS, Trait.TORCH_GRAPH, Trait.TRAINABLE, Trait.UNFITTED,
                   Trait.PLAIN_GRAPH})
SEQUENCE = 256
HELD_OUT = 8


def teacher_of(model: Model) -> Blueprint:
    """The parent's blueprint, also while a recipe is only planned and the student's folder is still the parent's."""
    return blueprint_of(read_config(model.parent.path))


def check_student(owner: str, model: Model) -> None:
    """Raises Misfit where there is nothing to learn from the parent, or its words are not the student's."""
    teacher, parent = teacher_of(model), model.parent
    if teacher == model.blueprint:
        raise Misfit(f"{owner} has nothing to teach: the model is as large as its parent; put a technique that makes it"
                     " smaller before it, such as prune_depth or prune_width")
    same = parent.path == model.path or sha256(parent.tokenizer_file) == sha256(model.tokenizer_file)
    if teacher.vocab != model.blueprint.vocab or not same:
        raise Misfit(f"{owner} needs a teacher and a student with one tokenizer, and that of {parent.name} is another;"
                     " make the student from its parent")


def planned(
    model: Model, *, steps: int, minutes: float, tokens: int, rate: float, rank: int, sequence: int = SEQUENCE
) -> TrainPlan:
    kind = make("lora", {"rank": rank, "rate": rate}) if rank else make("full", {"rate": rate})
    return replace(model.train, steps=steps, seconds=60 * minutes, tokens_per_step=tokens, learning_rate=rate,
                   sequence=min(sequence, model.blueprint.context), methods=(str(kind),), layout="bucket", patience=0)


def texts(model: Model, plan: TrainPlan) -> tuple[Examples, Examples]:
    """(training windows, held-out windows spread over the text) of the calibration text."""
    from fivefold.techniques._shared.calibration import up_to

    wanted = -(-plan.steps * plan.tokens_per_step // plan.sequence) + HELD_OUT
    found = up_to(model, max(wanted, 2 * HELD_OUT), plan.sequence)
    if len(found) < 2 * HELD_OUT:
        raise DataError(f"distillation needs a calibration text of {2 * HELD_OUT * plan.sequence} tokens and there are"
                        f" {found.size}; give a longer one")
    apart = len(found) // HELD_OUT
    held = {apart // 2 + apart * k for k in range(HELD_OUT)}
    rows = [example(row) for row in found]
    return part([r for i, r in enumerate(rows) if i not in held]), part([r for i, r in enumerate(rows) if i in held])


def example(tokens: Any, first: int = 1) -> Example:
    """Token ids as a row of which all but the `first` are learned."""
    import numpy as np

    from fivefold.training.data import Example

    ids = np.asarray(tokens, np.int64)
    return Example(ids, np.arange(len(ids)) >= first, 0, hashlib.sha256(ids.tobytes()).digest())


def part(rows: Sequence[Example]) -> Examples:
    from fivefold.training.data import Examples

    return Examples(tuple(rows))


def taught(
    model: Model, name: str, plan: TrainPlan, parts: tuple[Examples, Examples],
    teaching: Callable[[Lesson], Teaching] | None = None,
) -> tuple[Model, Trained]:
    """The trained student, its plan as it was before, and the run's account."""
    from fivefold.techniques._shared.modules import workspace
    from fivefold.training.run import run

    folder: Path = workspace(model, name)
    done = run(model.but(train=plan), folder, parts=parts, teaching=teaching)
    return done.model.but(train=model.train, coverage=model.coverage), done


def told(done: Trained, plan: TrainPlan, score: str) -> str:
    """What a run reached, in one sentence's part."""
    f = done.fitted
    ended = f", {f.stopped}" if f.stopped else ""
    return (f"held-out {score} {f.before:.4f} -> {f.after:.4f} at step {f.best_step} of {f.steps}"
            f" ({f.steps * plan.tokens_per_step} tokens, {f.seconds:.0f} s{ended}), {done.numbers} numbers trained")
