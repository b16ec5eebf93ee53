"""What the student is asked: the teacher's whole distribution at every position.

    loss = mean over tokens of KL(teacher || student) = sum_y p(y) (log p(y) - log q(y))

The forward KL is the quality that is measured in the end, so it is the loss. The gradient of the logits is q - p, exact
with one softmax each; positions are taken in chunks, since one float32 copy of the logits of 1,024 tokens over 49,152
words is 200 MB.

Source: Hinton et al., arXiv 1503.02531.
"""

from __future__ import annotations

import torch

CHUNK = 256


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """Logits (tokens, vocabulary) of both -> KL per token, (tokens,)."""
        q, p = torch.log_softmax(student.float(), -1), torch.log_softmax(teacher.float(), -1)
        likely = p.exp()
        ctx.save_for_backward(student, likely)
        return (likely * (p - q)).sum(-1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[no-untyped-def]
        student, likely = ctx.saved_tensors
        q = torch.softmax(student.float(), -1)
        return ((q - likely) * grad[:, None]).to(student.dtype), None


def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher || student), nats per token, of logits (..., vocabulary); differentiable in `student`."""
    ours, theirs = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    parts = [_ForwardKL.apply(ours[i : i + CHUNK], theirs[i : i + CHUNK]) for i in range(0, len(ours), CHUNK)]
    total: torch.Tensor = torch.cat(parts).mean()
    return total
