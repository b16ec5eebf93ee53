"""Distillation: a cut model learns its parent's answers back, and is refused where there is nothing to learn."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fivefold.engines import open_session
from fivefold.errors import DataError, Misfit, RecipeError
from fivefold.export import export
from fivefold.model import Model
from fivefold.recipe import Recipe
from fivefold.tasks.choice import Answers
from fivefold.tasks.loyalty import loyalty
from fivefold.techniques._shared.calibration import windows
from fivefold.techniques._shared.distilling import HELD_OUT, texts
from fivefold.techniques._shared.modules import stored_tensors
from fivefold.techniques.inference.distill import Distill
from fivefold.training.module import load_module
from fivefold.training.rollout import drawn

CUT = "prune_depth(layers=2, windows=1)"
SHORT: dict[str, Any] = {"steps": 30, "tokens": 512, "rate": 3e-3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def student(tiny: Callable[..., Model], tmp_path: Path) -> Model:
    """Two of four layers, in float32 so that small differences are not rounding."""
    parent = tiny(layers=4)
    return Recipe.parse(CUT).apply(parent.but(train=replace(parent.train, dtype="float32"), work=tmp_path / "cut"))


def held_out(model: Model) -> tuple[float, float]:
    found = re.search(r"held-out KL ([\d.]+) -> ([\d.]+)", model.coverage[-1])
    assert found
    return float(found[1]), float(found[2])


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "skew_kl", "jsd"])
def test_every_objective_brings_answers_back(student: Model, objective: Any) -> None:
    done = Distill(objective=objective, **SHORT).apply(student)
    before, after = held_out(done)
    assert after < 0.8 * before
    assert done.parent.path == student.parent.path and done.blueprint == student.blueprint
    assert done.train == student.train and done.coverage[:-1] == student.coverage


def test_the_held_out_score_is_the_kl_to_the_parent(student: Model) -> None:
    technique = Distill(steps=1, tokens=256)
    done = technique.apply(student)
    rows = np.stack([row.tokens for row in texts(student, technique._plan(student))[1].rows])
    assert len(rows) == HELD_OUT
    exact = []
    for model in (student, done):
        with torch.no_grad():
            theirs, ours = (torch.log_softmax(load_module(m)(torch.from_numpy(rows)).logits[:, :-1].double(), -1)
                            for m in (model.parent, model))
        exact.append(float((theirs.exp() * (theirs - ours)).sum(-1).mean()))
    assert held_out(done)[0] == pytest.approx(exact[0], abs=2e-4)
    assert held_out(done)[1] == pytest.approx(min(exact), abs=2e-4)


def test_it_learns_all_weights_or_an_adapter(student: Model) -> None:
    before = {name: t.numpy() for name, t in stored_tensors(student).items()}
    for rank, touched in ((0, set(before)), (2, {n for n in before if "proj" in n})):
        done = Distill(**{**SHORT, "steps": 3}, rank=rank).apply(student)
        moved = {n for n, t in stored_tensors(done).items() if (t.numpy() != before[n]).any()}
        assert moved == touched


def test_its_plan_names_the_time_it_may_take(student: Model) -> None:
    plan = Distill(minutes=0.5)._plan(student)
    assert plan.seconds == 30 and plan.steps == 240
    done = Distill(steps=100_000, tokens=64, minutes=0.02).apply(student)
    assert int(re.findall(r"of (\d+) \(", done.coverage[-1])[-1]) < 2000


def test_hidden_states_help_and_find_their_places(student: Model) -> None:
    done = Distill(**SHORT, features=1.0).apply(student)
    assert re.search(r"layers \d, 4 of the teacher, places by equal weights", done.coverage[-1])
    before, after = held_out(done)
    assert after < 0.8 * before


def answers(model: Model, folder: Path) -> Answers:
    """200 beginnings of real texts, each to be gone on with by one of ten tokens."""
    asked = windows(model, 200, 12)
    folder.mkdir()
    session = open_session(export(model, folder))
    scores = np.stack([session.score(row.tolist())[-1, 20:30] for row in asked]).astype(np.float64)
    session.close()
    probabilities = np.exp(scores - np.logaddexp.reduce(scores, 1, keepdims=True))
    return Answers("words", "same", tuple(probabilities), np.zeros(200, np.int64))


def test_the_student_becomes_loyal(student: Model, tmp_path: Path) -> None:
    done = Distill(**{**SHORT, "steps": 60}).apply(student)
    parent = answers(student.parent, tmp_path / "parent")
    pairs = (("before", student), ("after", done))
    before, after = (loyalty(parent, answers(m, tmp_path / name)) for name, m in pairs)
    for name in ("label_loyalty", "probability_loyalty"):
        assert (after[name].value or 0) > (before[name].value or 0) + 0.02, name


def test_it_fits_between_a_cut_and_a_quantizer(student: Model, tmp_path: Path) -> None:
    recipe = Recipe.parse(f'distill(steps=2) + gguf(type="q8_0") + {CUT}')
    assert [t.name for t in recipe] == ["prune_depth", "distill", "gguf"]
    wide = Recipe.parse('distill(steps=2) + repair(steps=2) + gguf(type="q4_0") + prune_width(channels=0.5)')
    assert [t.name for t in wide] == ["prune_width", "distill", "gguf", "repair"]
    done = recipe.apply(student.parent.but(work=tmp_path / "work"))
    (tmp_path / "out").mkdir()
    session = open_session(export(done, tmp_path / "out"))
    assert len(list(session.generate([5, 6, 7], 4))) == 4
    session.close()


def test_refusals(tiny: Callable[..., Model], student: Model, tmp_path: Path) -> None:
    with pytest.raises(Misfit, match="nothing to teach"):
        Recipe(Distill()).check(student.parent)
    with pytest.raises(RecipeError, match="on_policy"):
        Distill(teacher_mix=0.2)
    other = tiny(layers=3)
    (other.path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(Misfit, match="one tokenizer"):
        Distill().check(student.but(origin=other))
    text = tmp_path / "short.txt"
    text.write_text("too short " * 20, encoding="utf-8")
    with pytest.raises(DataError, match="longer"):
        Distill(**SHORT).apply(student.but(calibration=text))
    assert [t.name for t in Recipe.parse("wanda + distill")] == ["distill", "wanda"]


def test_features_need_one_width(tiny: Callable[..., Model], student: Model) -> None:
    narrow = student.but(blueprint=replace(student.blueprint, width=32))
    Distill().check(narrow)
    with pytest.raises(Misfit, match="hidden states"):
        Distill(features=1.0).check(narrow)


def on_own_words(model: Model) -> float:
    """KL(student || parent) per token where the student went on from the beginnings of real texts itself."""
    ours, theirs = load_module(model), load_module(model.parent)
    tokens = drawn(ours, torch.from_numpy(windows(model, 64, 64)), 64, (1,))
    with torch.no_grad():
        q, p = (torch.log_softmax(m(tokens).logits[:, 63:-1].double(), -1) for m in (ours, theirs))
    return float((q.exp() * (q - p)).sum(-1).mean())


def test_on_policy_lowers_the_error_on_its_own_words(student: Model) -> None:
    """With as many tokens learned: half of those that pass on-policy are."""
    told: dict[str, Any] = {"objective": "reverse_kl", "steps": 40, "rate": 3e-3}
    given, own = (Distill(**told, on_policy=s, tokens=t).apply(student) for s, t in ((0.0, 512), (1.0, 1024)))
    assert on_own_words(own) < 0.8 * on_own_words(given) < 0.8 * on_own_words(student)
