"""The teacher-student loss."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fivefold.training.distill import forward_kl


def test_forward_kl_and_its_gradient() -> None:
    torch.manual_seed(0)
    student = torch.randn(3, 300, 7, requires_grad=True)
    teacher = torch.randn(3, 300, 7)
    ours = forward_kl(student, teacher)
    (mine,) = torch.autograd.grad(ours, student)
    reference = F.kl_div(torch.log_softmax(student, -1).flatten(0, 1), torch.log_softmax(teacher, -1).flatten(0, 1),
                         log_target=True, reduction="batchmean")
    (theirs,) = torch.autograd.grad(reference, student)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(mine, theirs)
