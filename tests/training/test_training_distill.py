"""The teacher-student lesson: its losses are those of whole logits, its layers find their places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small import module
from torch.nn import functional as F

from fivefold.training import attention, layer, lean
from fivefold.training.batching import Batch
from fivefold.training.cross_entropy import IGNORE
from fivefold.training.distill import Pupil, forward_kl, places
from fivefold.training.divergence import Divergence


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


def batch(rows: int = 3, length: int = 40, seed: int = 0) -> Batch:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(1, 97, (rows, length))
    targets = np.append(tokens[:, 1:], np.full((rows, 1), IGNORE), 1)
    targets[draw.random(targets.shape) < 0.3] = IGNORE
    return Batch(tokens, targets, np.tile(np.arange(length), (rows, 1)))


def cut(teacher: Any, kept: list[int]) -> Any:
    """A student of the same weights with the `kept` layers only."""
    student = module(type(teacher).__name__.removesuffix("ForCausalLM"), num_hidden_layers=len(kept))
    found = teacher.state_dict()
    for new, old in enumerate(kept):
        found |= {n.replace(f"layers.{old}.", f"layers.{new}."): t for n, t in teacher.state_dict().items()
                  if f"layers.{old}." in n}
    student.load_state_dict({n: found[n] for n in student.state_dict()})
    return student


def pupil(student: Any, teacher: Any, **more: Any) -> Pupil:
    attention.use(student)
    layer.install(student)
    lean.install(student)
    return Pupil(student=student, teacher=teacher.eval().requires_grad_(False),
                 divergence=more.pop("divergence", Divergence()), **more)


def plain(student: Any, teacher: Any, given: Batch, places_: list[int], features: float) -> torch.Tensor:
    """forward KL + features x relative distance, from all logits and hidden states of the models themselves."""
    tokens, where = torch.from_numpy(given.tokens), torch.from_numpy(given.targets != IGNORE)
    states: dict[int, torch.Tensor] = {}
    hooks = [part.register_forward_hook(lambda _, a, out, i=i: states.__setitem__(i + 1, out))
             for i, part in enumerate(teacher.model.layers)]
    mine: dict[int, torch.Tensor] = {}
    hooks += [part.register_forward_hook(lambda _, a, out, i=i: mine.__setitem__(i, out))
              for i, part in enumerate(student.model.layers)]
    with torch.no_grad():
        theirs = teacher(tokens, use_cache=False).logits
    ours = student(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    loss = F.kl_div(torch.log_softmax(ours[where], -1), torch.log_softmax(theirs[where], -1), log_target=True,
                    reduction="batchmean")
    for i, place in enumerate(places_ if features else ()):
        a, b = mine[i][where], states[place][where]
        loss = loss + features / len(places_) * ((a - b).norm(dim=-1) / b.norm(dim=-1)).square().mean()
    return loss


@pytest.mark.parametrize("features", [0.0, 0.7])
def test_loss_and_gradients_are_those_of_whole_logits(features: float) -> None:
    teacher = module("Llama", num_hidden_layers=4)
    wanted = plain(student := cut(teacher, [0, 2]), teacher, batch(), [2, 4], features)
    wanted.backward()
    exact = {n: p.grad.clone() for n, p in student.named_parameters()}
    student.zero_grad()
    lesson = pupil(student, teacher, features=features)
    loss = lesson.loss(batch())
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    loss.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, exact[name], rtol=2e-3, atol=2e-5, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(lesson.held_loss(batch()), plain(student, teacher, batch(), [], 0.0),
                                   rtol=1e-4, atol=1e-5)


def test_a_student_with_all_layers_has_no_loss() -> None:
    teacher = module("Llama")
    lesson = pupil(cut(teacher, [0, 1]), teacher, features=1.0, divergence=Divergence(kind="reverse_kl"))
    loss = lesson.loss(batch())
    loss.backward()
    assert abs(float(loss.detach())) < 1e-5
    assert max(float(p.grad.abs().max()) for p in lesson.student.parameters()) < 1e-4


def test_heads_that_are_more_than_a_product() -> None:
    teacher = module("Gemma2", final_logit_softcapping=5.0, num_hidden_layers=2, head_dim=8)
    student = module("Gemma2", seed=1, final_logit_softcapping=5.0, num_hidden_layers=2, head_dim=8)
    wanted = plain(student, teacher, batch(), [], 0.0)
    torch.testing.assert_close(pupil(student, teacher).loss(batch()), wanted, rtol=1e-4, atol=1e-5)


def test_layers_find_their_places() -> None:
    teacher = module("Llama", num_hidden_layers=6)
    kept = cut(teacher, [0, 1, 4])
    assert places(kept.model.layers, teacher.model.layers) == ([1, 4, 6], True)
    other = module("Llama", seed=5, num_hidden_layers=3)
    assert places(other.model.layers, teacher.model.layers) == ([2, 4, 6], False)
