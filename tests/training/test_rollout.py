"""Rollouts are drawn from the student (or the mixture), only what was drawn is learned, and each step draws its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import VOCAB, module

from fivefold.training import attention, layer, lean
from fivefold.training.batching import Batch
from fivefold.training.cross_entropy import IGNORE
from fivefold.training.rollout import PIECE, drawn, own_turn, rollout


def prepared(seed: int = 0) -> torch.nn.Module:
    made = module("Llama", seed=seed).requires_grad_(True)
    attention.use(made)
    layer.install(made)
    lean.install(made)
    return made


def batch(rows: int, length: int) -> Batch:
    tokens = np.random.default_rng(0).integers(1, VOCAB, (rows, length))
    return Batch(tokens, np.append(tokens[:, 1:], np.full((rows, 1), IGNORE), 1), np.zeros_like(tokens))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.7, 1.0])
def test_turns_are_evenly_spread(share: float) -> None:
    turns = [own_turn(step, share) for step in range(1000)]
    for first in range(0, 1000, 100):
        assert sum(turns[first : first + 100]) == pytest.approx(100 * share, abs=1)


def test_only_what_was_drawn_is_learned() -> None:
    student, given = prepared(), batch(2, 2 * PIECE + 7)
    out = rollout(given, student, (0, 1))
    assert out.tokens.shape == (4, PIECE) and out.segments is None
    half = PIECE // 2
    np.testing.assert_array_equal(out.tokens[:, :half], given.tokens[:, : 2 * PIECE].reshape(4, PIECE)[:, :half])
    assert (out.targets[:, : half - 1] == IGNORE).all() and (out.targets[:, -1] == IGNORE).all()
    np.testing.assert_array_equal(out.targets[:, half - 1 : -1], out.tokens[:, half:])
    assert rollout(given, student, (0, 1)).tokens.tolist() == out.tokens.tolist()
    assert rollout(given, student, (0, 2)).tokens.tolist() != out.tokens.tolist()
    assert student.training and student.config._attn_implementation == attention.NAME


@pytest.mark.parametrize("mix", [0.0, 0.6])
def test_tokens_follow_the_mixture(mix: float) -> None:
    """Counts of the first and the second token drawn, over many copies of one prompt: chi-square at 5 deviations."""
    student, teacher = prepared(), prepared(seed=3)
    prompt = torch.randint(1, VOCAB, (1, 6), generator=torch.Generator().manual_seed(0))
    found = drawn(student, prompt.expand(20_000, -1), 2, (7,), teacher=teacher, mix=mix)

    @torch.no_grad()
    def mixed(tokens: torch.Tensor) -> torch.Tensor:
        pairs = ((student, 1 - mix), (teacher, mix))
        parts = [share * torch.softmax(m(tokens).logits[:, -1].double(), -1) for m, share in pairs]  # type: ignore[operator]
        return parts[0] + parts[1]

    first = mixed(prompt)
    second = first @ mixed(torch.cat([prompt.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], 1))
    for place, p in ((6, first[0]), (7, second[0])):
        counts, expected = torch.bincount(found[:, place], minlength=VOCAB).double(), len(found) * p
        large = expected >= 5
        spread = float(((counts - expected)[large] ** 2 / expected[large]).sum())
        freedom = int(large.sum())
        assert freedom > 50 and abs(spread - freedom) < 5 * (2 * freedom) ** 0.5
