"""The chunked loss is the plain one, in value and gradients, without the logits of all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fivefold.training.cross_entropy import CHUNK, IGNORE, TOGETHER, head_loss

WIDTH, VOCAB = 12, 37


def problem(count: int, ignored: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, WIDTH, generator=draw, requires_grad=True)
    weight = (2 * torch.randn(VOCAB, WIDTH, generator=draw)).requires_grad_()
    targets = torch.randint(VOCAB, (count,), generator=draw)
    targets[torch.rand(count, generator=draw) < ignored] = IGNORE
    return hidden, weight, targets


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    loss = F.cross_entropy(hidden.double() @ weight.double().T, targets, ignore_index=IGNORE)
    return [loss, *torch.autograd.grad(1.7 * loss, [hidden, weight])]


@pytest.mark.parametrize("count", [1, 2, 127, 128, 129, 1023, 1024, 1025, 1024 + 128, 1024 + 129, 2049])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_loss_and_gradients_at_the_borders_of_chunks(count: int, ignored: float) -> None:
    assert (CHUNK, TOGETHER) == (128, 1024)
    hidden, weight, targets = problem(count, ignored)
    targets[0] = 5
    loss = head_loss(hidden, weight, targets)
    ours = [loss, *torch.autograd.grad(1.7 * loss, [hidden, weight])]
    for mine, theirs in zip(ours, plain(hidden, weight, targets), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-4, atol=1e-6)
    assert loss.dtype == torch.float32 and loss.shape == ()


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_the_gradients_asked_for(trained: str) -> None:
    hidden, weight, targets = problem(300, 0.3)
    wanted = plain(hidden, weight, targets)[1 if trained == "hidden" else 2]
    (weight if trained == "hidden" else hidden).requires_grad_(False)
    (found,) = torch.autograd.grad(1.7 * head_loss(hidden, weight, targets), hidden if trained == "hidden" else weight)
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-4, atol=1e-6)


def test_shapes_counts_and_no_gradient() -> None:
    hidden, weight, targets = problem(60, 0.2)
    apart = head_loss(hidden.view(3, 20, WIDTH), weight, targets.view(3, 20))
    torch.testing.assert_close(apart, head_loss(hidden, weight, targets))
    with torch.no_grad():
        still = head_loss(hidden, weight, targets)
    assert not still.requires_grad
    torch.testing.assert_close(still, apart.detach())
    learned = int((targets != IGNORE).sum())
    torch.testing.assert_close(head_loss(hidden, weight, targets, count=1), apart * learned)


def test_no_target_is_no_loss() -> None:
    hidden, weight, targets = problem(20)
    loss = head_loss(hidden, weight, torch.full_like(targets, IGNORE))
    assert float(loss.detach()) == 0.0
    of_hidden, of_weight = torch.autograd.grad(loss, [hidden, weight], allow_unused=True)
    assert not of_hidden.any() and (of_weight is None or not of_weight.any())


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = problem(200)
    hidden = (200 * hidden.detach()).requires_grad_()
    loss = head_loss(hidden, weight, targets)
    for mine, theirs in zip([loss, *torch.autograd.grad(1.7 * loss, [hidden, weight])],
                            plain(hidden, weight, targets), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [100, 1500])
def test_in_bfloat16_it_is_no_worse_than_the_plain_way(count: int) -> None:
    hidden, weight, targets = problem(count, 0.3)
    halves = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    exact = plain(*(t.detach().float().requires_grad_() for t in halves), targets)
    loss = head_loss(halves[0], halves[1], targets)
    ours = [loss, *torch.autograd.grad(1.7 * loss, halves)]
    usual = F.cross_entropy((halves[0] @ halves[1].T).float(), targets, ignore_index=IGNORE)
    theirs = [usual, *torch.autograd.grad(1.7 * usual, halves)]
    assert [t.dtype for t in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        off = [float(((t.double() - right).norm() / right.norm()).detach()) for t in (mine, other)]
        assert off[0] < 0.01 and off[0] < 1.5 * off[1] + 1e-4


class Largest(TorchDispatchMode):
    """The most elements of a new tensor by dtype, of those that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.numel: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numel[tensor.dtype] = max(self.numel.get(tensor.dtype, 0), tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", [False, True])
def test_the_logits_of_all_tokens_are_never_there(dtype: torch.dtype, head: bool) -> None:
    count, vocab = 4000, 500
    hidden = torch.randn(count, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, 4, dtype=dtype, requires_grad=head)
    targets = torch.randint(vocab, (count,))
    with Largest() as seen:
        head_loss(hidden, weight, targets).backward()
    rest = max(hidden.numel(), weight.numel())
    assert seen.numel[torch.float32] <= max(rest, (TOGETHER if head and dtype == torch.float32 else CHUNK) * vocab)
    assert seen.numel[dtype] <= max(rest, (TOGETHER if head else CHUNK) * vocab)
    with Largest() as usual:
        F.cross_entropy(hidden @ weight.T, targets).backward()
    assert usual.numel[dtype] == count * vocab


def test_tokens_without_a_target_never_reach_the_head() -> None:
    hidden, weight = torch.randn(1000, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    targets = torch.full((1000,), IGNORE)
    targets[::50] = 3
    with Largest() as seen:
        head_loss(hidden, weight, targets).backward()
    assert max(seen.numel.values()) <= max(20 * 500, hidden.numel())
