"""What every student of distillation is taught: the parent's answers on calibration text, and how it is judged.

The loss is KL(parent || student) over the whole vocabulary; the score is the same on a few windows spread over the
text, which are never trained on. The parent's answers to those are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fivefold.model import Model, TrainPlan
from fivefold.techniques._shared.calibration import windows
from fivefold.training.distill import forward_kl
from fivefold.training.module import load_module

if TYPE_CHECKING:
    from fivefold.techniques._shared.students import Student

HELD_OUT = 4
TEXT_TOKENS = 65536
AT_ONCE = 4
"""Sequences that pass the model together."""


class Lesson:
    """Teacher and student side by side. The teacher is the student's own module where that is still the parent's."""

    def __init__(self, model: Model, student: Student, held_out: Any) -> None:
        self.student, parent = student, model.parent
        self.teacher: Any = student.module if parent.path == model.path else load_module(parent, torch.float32)
        self.held_out = [(torch.as_tensor(row)[None], self._answers(torch.as_tensor(row)[None], exact=True))
                         for row in held_out]

    def _answers(self, tokens: torch.Tensor, *, exact: bool) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            answers: torch.Tensor = self.teacher(tokens, use_cache=False).logits.float()
            return answers

    def loss(self, rows: Any) -> torch.Tensor:
        tokens = torch.as_tensor(rows)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.student.logits(tokens)
        return forward_kl(logits, self._answers(tokens, exact=False))

    def score(self) -> float:
        with torch.no_grad():
            return sum(float(forward_kl(self.student.logits(t), a)) for t, a in self.held_out) / len(self.held_out)


def text(model: Model, plan: TrainPlan) -> tuple[Any, Any]:
    """(training windows, held-out windows) of the calibration text, the latter spread over it."""
    wanted = min(TEXT_TOKENS, plan.steps * plan.tokens_per_step) // plan.sequence + HELD_OUT
    found = windows(model, max(wanted, 2 * HELD_OUT), plan.sequence)
    apart = len(found) // HELD_OUT
    held = [apart // 2 + apart * k for k in range(HELD_OUT)]
    return found[[i for i in range(len(found)) if i not in held]], found[held]
