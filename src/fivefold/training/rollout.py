"""Rollouts: texts that the student itself goes on with, so that it learns where its own words lead it.

A student trained on given texts only ever sees right beginnings; when it speaks, it goes on from its own, and its
errors add up (exposure bias). On-policy distillation cuts each text into pieces, keeps the first half of a piece and
lets the student draw the second; the teacher then says what it would have said at each of those places, and only they
are learned. With `mix`, each token is drawn from mix x teacher + (1 - mix) x student, which keeps a weak student from
talking nonsense at first.

Drawn in a batch with a key-value cache, one pass of the student per token (and one of the teacher where it mixes), so a
rollout takes about as long as several ordinary steps; weights move between rollouts, so none is used twice.

Sources: Agarwal et al., GKD, arXiv 2306.13649; teacher-mixed sampling: Gu et al., MiniLLM, arXiv 2306.08543.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fivefold.training.attention import NAME
from fivefold.training.batching import Batch
from fivefold.training.cross_entropy import IGNORE
from fivefold.training.optimizer import seeded

PIECE = 128


def own_turn(step: int, share: float) -> bool:
    """Whether 0-based `step` is one of the `share` of all steps that are on-policy, evenly spread."""
    return int((step + 1) * share) > int(step * share)


def rollout(
    batch: Batch, student: Any, seed: tuple[int, ...], *, teacher: Any = None, mix: float = 0.0
) -> Batch:
    """The rows of `batch` cut into pieces of at most PIECE, the second half of each drawn and to be learned."""
    width = min(PIECE, batch.tokens.shape[1])
    half = width // 2
    pieces = batch.tokens[:, : batch.tokens.shape[1] // width * width].reshape(-1, width)
    prompts = torch.from_numpy(np.ascontiguousarray(pieces[:, :half])).to(student.device)
    tokens = drawn(student, prompts, width - half, seed, teacher=teacher, mix=mix).cpu().numpy()
    targets = np.full(tokens.shape, IGNORE, np.int64)
    targets[:, half - 1 : -1] = tokens[:, half:]
    return Batch(tokens, targets, np.tile(np.arange(width), (len(tokens), 1)))


@torch.no_grad()
def drawn(
    student: Any, prompts: torch.Tensor, count: int, seed: tuple[int, ...], *, teacher: Any = None, mix: float = 0.0
) -> torch.Tensor:
    """Prompts (rows, length) of one length with `count` tokens drawn to each, (rows, length + count)."""
    draw = seeded(*seed)
    models = [(student, 1 - mix)] + ([(teacher, mix)] if mix else [])
    caches: list[Any] = [None] * len(models)
    tokens, new = prompts, prompts
    with _cached(*(model for model, _ in models)):
        for _ in range(count):
            total = torch.zeros(())
            for i, (model, share) in enumerate(models):
                out = model(input_ids=new, past_key_values=caches[i], use_cache=True, logits_to_keep=1)
                caches[i] = out.past_key_values
                total = total + share * torch.softmax(out.logits[:, -1].float().cpu(), -1)
            new = torch.multinomial(total, 1, generator=draw).to(prompts.device)
            tokens = torch.cat([tokens, new], 1)
    return tokens


@contextmanager
def _cached(*models: Any) -> Iterator[None]:
    """The models in evaluation mode, attending in a way that knows a cache."""
    before = [(model, model.training, model.config._attn_implementation) for model in models]
    try:
        for model, _, attention in before:
            model.eval()
            if attention == NAME:
                model.set_attn_implementation("sdpa")
        yield
    finally:
        for model, training, attention in before:
            model.train(training)
            if attention == NAME:
                model.set_attn_implementation(attention)
