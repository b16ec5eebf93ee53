"""Distillation by words: the student learns what the parent wrote in its engine, and nothing else of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fivefold.engines import open_session
from fivefold.errors import DataError, Misfit
from fivefold.export import export
from fivefold.model import Model
from fivefold.recipe import Recipe
from fivefold.techniques._shared.calibration import up_to
from fivefold.techniques.inference.distill_text import DistillText
from fivefold.tokenizer import Tokenizer
from fivefold.training.data import Example

SHORT: dict[str, Any] = {"steps": 40, "tokens": 512, "rate": 3e-3, "texts": 64, "prompt": 16, "answer": 24}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def student(tiny: Callable[..., Model], tmp_path: Path) -> Model:
    parent = tiny(layers=4)
    cut = Recipe.parse("prune_depth(layers=2, windows=1)")
    return cut.apply(parent.but(train=replace(parent.train, dtype="float32"), work=tmp_path / "cut"))


def learned(row: Example) -> list[int]:
    return [int(t) for t in row.tokens[row.learn]]


def test_what_is_learned_is_the_parents_greedy_answer(student: Model) -> None:
    """Beside the parent asked one prompt at a time."""
    technique, tokenizer = DistillText(**{**SHORT, "texts": 40}), Tokenizer(student.tokenizer_file)
    rows = list(technique._written(student))
    prompts = up_to(student, 40, 16)
    session, right = open_session(student.parent), 0
    for prompt, row in zip(prompts, rows, strict=True):
        said = list(session.generate(prompt.tolist(), 24))
        before = tokenizer.encode(tokenizer.decode(prompt.tolist()))
        whole = tokenizer.encode(tokenizer.decode(prompt.tolist()) + tokenizer.decode(said))
        assert row.tokens[: len(before)].tolist() == before and not row.learn[: len(before)].any()
        right += whole == row.tokens.tolist()
    session.close()
    assert len(rows) == 40 and right >= 38


def test_it_learns_to_write_like_its_parent(student: Model, tmp_path: Path) -> None:
    done = DistillText(**SHORT).apply(student)
    found = re.search(r"(\d+) texts with .* held-out loss ([\d.]+) -> ([\d.]+)", done.coverage[-1])
    assert found and int(found[1]) == 64 and float(found[3]) < 0.8 * float(found[2])
    rows = list(DistillText(**SHORT)._written(student))[::8]

    def surprise(model: Model, name: str) -> float:
        """Of the parent's words, in the engine that serves."""
        (tmp_path / name).mkdir()
        session = open_session(export(model, tmp_path / name))
        logs = [session.score(r.tokens.tolist())[:-1][np.arange(len(r.tokens) - 1), r.tokens[1:]][r.learn[1:]]
                for r in rows]
        session.close()
        return -float(np.concatenate(logs).mean())

    assert surprise(done, "after") < 0.8 * surprise(student, "before")


def test_the_parent_is_only_asked_for_text(student: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*given: Any) -> None:
        raise AssertionError("probabilities of the teacher were looked at")

    monkeypatch.setattr("fivefold.engines.torch_.TorchSession.score", forbidden)
    monkeypatch.setattr("fivefold.training.distill.Pupil.__post_init__", forbidden)
    assert "texts" in DistillText(**{**SHORT, "steps": 2}).apply(student).coverage[-1]


def test_drawn_answers_differ_and_repeat(student: Model) -> None:
    technique = DistillText(**{**SHORT, "texts": 32}, temperature=1.0)
    one, other = ([learned(r) for r in technique._written(student)] for _ in range(2))
    greedy = [learned(r) for r in DistillText(**{**SHORT, "texts": 32})._written(student)]
    assert one == other != greedy


def test_prompts_of_the_train_plan(student: Model, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"The fox jumps {i} times", "completion": " over it"} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    technique = DistillText(**{**SHORT, "steps": 2}, prompts="examples")
    with pytest.raises(Misfit, match="examples"):
        technique.check(student)
    asked = student.but(train=replace(student.train, data=file))
    tokenizer = Tokenizer(student.tokenizer_file)
    for i, row in enumerate(technique._written(asked)):
        assert tokenizer.decode(row.tokens[~row.learn].tolist()) == f"The fox jumps {i} times"
    done = technique.apply(asked)
    assert "20 texts" in done.coverage[-1] and done.train == asked.train


def test_learning_the_prompts_words_too(student: Model) -> None:
    row = next(DistillText(**SHORT, learn="all")._written(student))
    assert row.learn[1:].all() and not row.learn[0]


def test_writing_ends_with_its_share_of_the_time(student: Model) -> None:
    technique = DistillText(**{**SHORT, "texts": 100_000, "prompt": 1}, minutes=0.02)
    assert 32 <= len(list(technique._written(student))) < 20_000
    assert technique._plan(student, 0.005).seconds == pytest.approx(0.9)


def test_refusals(student: Model) -> None:
    with pytest.raises(Misfit, match="nothing to teach"):
        Recipe(DistillText()).check(student.parent)
    with pytest.raises(Misfit, match="shorter"):
        DistillText(prompt=64, answer=100).check(student)
    with pytest.raises(DataError, match="needs 16"):
        short = student.work
        assert short is not None
        (short / "short.txt").write_text("a few words only, no more", encoding="utf-8")
        DistillText(**SHORT).apply(student.but(calibration=short / "short.txt"))


def test_words_come_before_probabilities() -> None:
    recipe = Recipe.parse('distill + distill_text + gguf(type="q8_0") + prune_depth(layers=1)')
    assert [t.name for t in recipe] == ["prune_depth", "distill_text", "distill", "gguf"]
