"""How far a student's distribution q is from its teacher's p: four divergences, their gradients, a chunk at a time.

    forward_kl   sum p log(p / q)                                                      g = q - p
    reverse_kl   sum q log(q / p)                                                      g = q (log(q / p) - KL)
    skew_kl      sum p log(p / m)                       m = a p + (1 - a) q            g = q (s - <q, s>)
    jsd          b sum p log(p / m) + (1 - b) sum q log(q / m)    m = b p + (1 - b) q  g = (1 - b) q (r - <q, r>)

with s = -(1 - a) p / m, r = log(q / m), and g the gradient by the student's logits over the temperature T: both
distributions are softmax(logits / T), and the loss is multiplied by T^2 so that its gradients keep their size.

Forward KL is infinite where the teacher says what the student does not, so a small student *covers*: it spreads over
all the teacher may say. Reverse KL is infinite where the student says what the teacher does not, so it *seeks a mode*.
A skewed KL is forward KL against a mixture with a share of p in it: ratios p / m stay below 1 / a, so the gradient of a
rare token cannot take over. The generalised Jensen-Shannon divergence lies between the two KLs: over b it tends to the
forward KL as b goes to 0, over 1 - b to the reverse KL as b goes to 1.

The gradient follows from the logits alone, so a chunk of tokens is carried to its gradients in the forward pass
(`cross_entropy.through_head`), and the logits of all tokens are never there, neither the teacher's nor the student's.

Sources: Hinton et al., arXiv 1503.02531 (temperature); Gu et al., MiniLLM, arXiv 2306.08543 (reverse KL); Ko et al.,
DistiLLM, arXiv 2402.03898 (skew KL); Agarwal et al., GKD, arXiv 2306.13649 (generalised JSD).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from fivefold.training.cross_entropy import CHUNK, through_head

Kind = Literal["forward_kl", "reverse_kl", "skew_kl", "jsd"]
Answers = Callable[[slice], torch.Tensor]
"""The teacher's float32 logits of some rows, a copy."""
Both = tuple[torch.Tensor, torch.Tensor | None]
TINY = 1e-38


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """`mix` is a of the skewed KL, b of the generalised JSD; both kinds need it strictly between 0 and 1."""

    kind: Kind = "forward_kl"
    temperature: float = 1.0
    mix: float = 0.1

    def __post_init__(self) -> None:
        if self.temperature <= 0 or (self.kind in ("skew_kl", "jsd") and not 0 < self.mix < 1):
            raise ValueError(f"{self} needs a temperature above 0 and a mix between 0 and 1")

    def of(
        self, student: torch.Tensor, teacher: torch.Tensor, gradient: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The divergence per token, (tokens,), of float32 logits (tokens, vocabulary), overwritten where T is not 1.

        That of their sum by `student` is written into `gradient`.
        """
        if self.temperature != 1:
            student, teacher = student.div_(self.temperature), teacher.div_(self.temperature)
        log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
        loss, slope = getattr(self, f"_{self.kind}")(log_p, log_q, gradient is not None)
        if gradient is not None:
            gradient.copy_(slope.mul_(self.temperature))
        out: torch.Tensor = loss * self.temperature**2
        return out

    def _forward_kl(self, log_p: torch.Tensor, log_q: torch.Tensor, wanted: bool) -> Both:
        p = log_p.exp()
        loss = _dot(p, log_p.sub_(log_q))
        return loss, log_q.exp_().sub_(p) if wanted else None

    def _reverse_kl(self, log_p: torch.Tensor, log_q: torch.Tensor, wanted: bool) -> Both:
        q = log_q.exp()
        ratio = log_q.sub_(log_p)
        loss = _dot(q, ratio)
        return loss, ratio.sub_(loss[:, None]).mul_(q) if wanted else None

    def _skew_kl(self, log_p: torch.Tensor, log_q: torch.Tensor, wanted: bool) -> Both:
        p, q = log_p.exp(), log_q.exp_()
        m = _mixed(self.mix, p, q)
        loss = _dot(p, log_p.sub_(m.log()))
        if not wanted:
            return loss, None
        pull = torch.div(p, m, out=m).mul_(self.mix - 1)
        return loss, pull.sub_(_dot(q, pull)[:, None]).mul_(q)

    def _jsd(self, log_p: torch.Tensor, log_q: torch.Tensor, wanted: bool) -> Both:
        p, q = log_p.exp(), log_q.exp()
        log_m = _mixed(self.mix, p, q).log_()
        ours = log_q.sub_(log_m)
        own = _dot(q, ours)
        loss = self.mix * _dot(p, log_p.sub_(log_m)) + (1 - self.mix) * own
        return loss, ours.sub_(own[:, None]).mul_(q).mul_(1 - self.mix) if wanted else None


def _mixed(share: float, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.lerp(q, p, share).clamp_min_(TINY)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(a, b)


def head_divergence(
    divergence: Divergence, hidden: torch.Tensor, weight: torch.Tensor, answers: Answers
) -> torch.Tensor:
    """Mean over tokens, a scalar in nats, of the student's logits hidden (n, d) x weight (v, d)'; differentiable."""

    def slope(logits: torch.Tensor, rows: slice, gradient: torch.Tensor | None) -> torch.Tensor:
        return divergence.of(logits, answers(rows), gradient).sum()

    return through_head(hidden, weight, slope, 1.0 / max(1, len(hidden)))


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, divergence, answers):  # type: ignore[no-untyped-def]
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for at in range(0, len(student), CHUNK):
            rows = slice(at, at + CHUNK)
            near = None if gradient is None else gradient[rows]
            total += divergence.of(student[rows].to(torch.float32, copy=True), answers(rows), near).sum()
        ctx.save_for_backward(gradient)
        return total / max(1, len(student))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(float(grad) / max(1, len(gradient))), None, None


def logits_divergence(divergence: Divergence, student: torch.Tensor, answers: Answers) -> torch.Tensor:
    """The same of logits (n, vocabulary) that are there already: for heads that are more than a product."""
    total: torch.Tensor = _OfLogits.apply(student, divergence, answers)
    return total
