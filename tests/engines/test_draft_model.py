"""Speculative sampling: the text has the large model's distribution, and a pass yields what the closed form says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chisquare

from fivefold.engines import Sampling, Session, open_session
from fivefold.engines._drafting import generated
from fivefold.engines._sampling import distribution, drawer
from fivefold.errors import ModelError
from fivefold.export import export
from fivefold.model import DecodePlan, ExportPlan, Model
from fivefold.recipe import Recipe
from fivefold.testing import tiny_model

Array = NDArray[np.float32]


class Chain:
    """A model whose next token depends on the last one alone: logits (vocab, vocab)."""

    def __init__(self, logits: Array, first: int) -> None:
        self.logits, self.start, self.passes = logits, first, 0

    def first(self) -> Sequence[Array]:
        return (self.logits[self.start],)

    def next(self, token: int, draft: list[int], kept: int) -> Sequence[Array]:
        self.passes += 1
        return [self.logits[t] for t in (token, *draft)]


class ChainDraft:
    """Draws from another chain, as `DraftText` does from a model."""

    def __init__(self, logits: Array, first: int, sampling: Sampling) -> None:
        self.logits, self.last, self.sampling = logits, first, sampling
        self.draw = drawer(replace(sampling, seed=sampling.seed + 1))
        self.doubts: list[Array] | None = None

    def append(self, token: int) -> None:
        self.last = token

    def draft(self, count: int) -> list[int]:
        at, found, self.doubts = self.last, [], []
        for _ in range(count):
            self.doubts.append(distribution(self.logits[at], self.sampling))
            at = self.draw(self.logits[at])
            found.append(at)
        return found


def text(p: Array, q: Array, count: int, sampling: Sampling, guesses: int) -> tuple[list[int], int]:
    chain = Chain(p, 0)
    plan = DecodePlan(draft_tokens=guesses)
    return list(generated(chain, [0], count, plan, sampling, drafter=ChainDraft(q, 0, sampling))), chain.passes


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8)])
def test_the_text_has_the_large_models_distribution(temperature: float, top_p: float) -> None:
    random = np.random.default_rng(4)
    p, q = (random.normal(size=(5, 5)).astype(np.float32) for _ in range(2))
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=7)
    tokens, _ = text(p, q, 30_000, sampling, 3)
    for before in range(5):
        after = np.bincount([b for a, b in pairwise(tokens) if a == before], minlength=5)
        wanted = distribution(p[before], sampling).astype(np.float64)
        inside = wanted > 0
        assert not after[~inside].any()
        if inside.sum() > 1:
            wanted = wanted[inside] / wanted[inside].sum()
            assert chisquare(after[inside], after.sum() * wanted).pvalue > 1e-4


@pytest.mark.parametrize("guesses", [1, 3, 6])
def test_a_pass_yields_what_the_closed_form_says(guesses: int) -> None:
    random = np.random.default_rng(5)
    row, other = (random.normal(size=6).astype(np.float32) for _ in range(2))
    p, q = np.tile(row, (6, 1)), np.tile(other, (6, 1))
    sampling = Sampling(temperature=1.0, seed=2)
    kept = float(np.minimum(distribution(row, sampling), distribution(other, sampling)).sum())
    tokens, passes = text(p, q, 20_000, sampling, guesses)
    assert len(tokens) / passes == pytest.approx((1 - kept ** (guesses + 1)) / (1 - kept), rel=0.02)


def test_a_draft_that_is_the_model_is_always_kept() -> None:
    p = np.random.default_rng(6).normal(size=(5, 5)).astype(np.float32)
    tokens, passes = text(p, p, 400, Sampling(temperature=1.0, seed=3), 3)
    assert len(tokens) == 400 and passes == 100


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "parent")


def plain(parent: Model, kind: str, folder: Path) -> Model:
    if kind == "safetensors":
        return parent
    return export(parent.but(export=ExportPlan(format="gguf", default="f32")), folder)


def said(session: Session, sampling: Sampling, count: int = 40) -> list[int]:
    try:
        return list(session.generate([5, 6, 7, 8], count, sampling))
    finally:
        session.close()


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_greedy_text_is_the_same_with_a_draft(parent: Model, tmp_path: Path, kind: str) -> None:
    model = plain(parent, kind, tmp_path / "plain")
    recipe = Recipe.parse('speculative(draft="q4_0", tokens=3)' + (' + gguf(type="f32")' if kind == "gguf" else ""))
    drafted = export(recipe.apply(parent.but(work=tmp_path / "work")), tmp_path / "drafted")
    assert drafted.decode.draft == tmp_path / "drafted" / "draft.gguf" and drafted.decode.draft.is_file()
    assert said(open_session(drafted), Sampling()) == said(open_session(model), Sampling())


def test_an_engine_draws_from_its_own_distribution(parent: Model, tmp_path: Path) -> None:
    """The first two tokens of many texts, against the probabilities the engine scores."""
    recipe = Recipe.parse('speculative(draft="q4_0", tokens=2) + gguf(type="f32")')
    drafted = export(recipe.apply(parent.but(work=tmp_path / "work")), tmp_path / "drafted")
    session = open_session(drafted)
    prompt, hot = [5, 6, 7, 8], 0.25
    rows: dict[tuple[int, ...], NDArray[np.float64]] = {}

    def wanted(before: tuple[int, ...]) -> NDArray[np.float64]:
        if before not in rows:
            scaled = session.score([*prompt, *before])[-1].astype(np.float64) / hot
            rows[before] = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
        return rows[before]

    pairs = [tuple(session.generate(prompt, 2, Sampling(temperature=hot, seed=seed))) for seed in range(1500)]
    first = wanted(())
    likely = np.argsort(-first)[:4]
    seen = np.array([sum(p[0] == t for p in pairs) for t in likely])
    groups = np.append(first[likely], 1 - first[likely].sum())
    assert chisquare(np.append(seen, len(pairs) - seen.sum()), len(pairs) * groups / groups.sum()).pvalue > 1e-4
    top = int(likely[0])
    second = wanted((top,))
    best = int(second.argmax())
    after = [p[1] for p in pairs if p[0] == top]
    share, spread = second[best], np.sqrt(second[best] * (1 - second[best]) / len(after))
    assert np.mean([t == best for t in after]) == pytest.approx(share, abs=4 * spread + 1e-3)
    session.close()


def test_two_texts_at_once_stay_apart(parent: Model, tmp_path: Path) -> None:
    drafted = export(Recipe.parse('speculative(draft="q4_0")').apply(parent.but(work=tmp_path / "w")), tmp_path / "d")
    session = open_session(drafted)
    alone = [list(session.generate(prompt, 12)) for prompt in ([5, 6, 7], [9, 8, 7, 6])]
    texts = [session.generate(prompt, 12) for prompt in ([5, 6, 7], [9, 8, 7, 6])]
    mixed: list[list[int]] = [[], []]
    for _ in range(12):
        for text_, found in zip(texts, mixed, strict=True):
            found.append(next(text_))
    assert mixed == alone
    session.close()


def test_a_draft_of_another_vocabulary_is_refused(parent: Model, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", vocab=300)
    small = export(other.but(export=ExportPlan(format="gguf", default="q8_0")), tmp_path / "small")
    with pytest.raises(ModelError, match="same tokenizer"):
        open_session(parent.but(decode=DecodePlan(draft=small.path, draft_tokens=2)))
