"""Repair brings answers back, through the rounding, and what it learnt is in the file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from fivefold.engines import open_session
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.model import Model, Trait
from fivefold.recipe import Recipe
from fivefold.techniques._shared.lesson import Lesson, text
from fivefold.techniques._shared.modules import rewritten, stored_tensors
from fivefold.techniques.inference.repair import Repair
from fivefold.training.module import load_module

TEXT = "the lazy fox watched 42 others from the hill, and it jumps over the quick brown dog."


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path / "cache"))


def held_out(model: Model) -> tuple[float, float]:
    said = model.coverage[-1].split("held-out KL ")[1].split(" at ")[0].split(" -> ")
    return float(said[0]), float(said[1])


def test_an_undamaged_model_is_refused(tiny: Callable[..., Model]) -> None:
    with pytest.raises(Misfit, match="nothing to repair"):
        Recipe(Repair()).check(tiny())


def test_it_comes_after_the_quantizer_and_not_before_another() -> None:
    recipe = Recipe.parse('repair(steps=3) + gguf(type="q4_0")')
    assert [t.name for t in recipe] == ["gguf", "repair"]
    with pytest.raises(Misfit):
        Recipe.parse("int8 + repair")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("codes", [False, True])
def test_quantized_models_answer_more_like_the_parent(
    tiny: Callable[..., Model], tmp_path: Path, family: str, codes: bool
) -> None:
    model = tiny(family, layers=2)
    damaged = Recipe.parse('gguf(type="q4_0", windows=1)').apply(model)
    repaired = Repair(steps=30, tokens=256, rate=3e-3, codes=codes).apply(damaged)
    before, after = held_out(repaired)
    assert after < 0.9 * before

    tokens = Tokenizer.from_file(str(model.tokenizer_file)).encode(TEXT).ids

    def kl(candidate: Model, folder: str) -> float:
        session, parent = open_session(export(candidate, tmp_path / folder)), open_session(model)
        try:
            ours, theirs = session.score(tokens), parent.score(tokens)
        finally:
            session.close()
            parent.close()
        return float((np.exp(theirs) * (theirs - ours)).sum(1).mean())

    assert kl(repaired, "repaired") < kl(damaged, "damaged")


def test_the_student_starts_as_the_file_and_ends_as_the_file(tiny: Callable[..., Model], tmp_path: Path) -> None:
    damaged = Recipe.parse('gguf(type="q4_1", windows=1)').apply(tiny(layers=2))
    technique = Repair(steps=2, tokens=256, codes=True)
    student = technique._student(damaged, 0)
    for part in student.parts.values():
        np.testing.assert_array_equal(part.packed(), part.parts.data)
        with torch.no_grad():
            part.scale.add_(0.1)
            part.u.add_(torch.randn_like(part.u))
    done = student.result()
    again = technique._student(done, 0)
    for key, part in student.parts.items():
        torch.testing.assert_close(again.parts[key](), part(), rtol=2e-3, atol=5e-4)


def test_pruned_models_recover_and_zeros_stay_zero(tiny: Callable[..., Model]) -> None:
    model = tiny(layers=2)
    random = np.random.default_rng(0)
    tensors = {}
    for name, tensor in stored_tensors(model).items():
        values = tensor.numpy()
        if "proj" in name:
            values = values * (random.random(values.shape) > 0.4)
        tensors[name] = values
    pruned = rewritten(model, "wanda", tensors).without(Trait.DENSE_WEIGHTS)
    repaired = Repair(steps=40, tokens=256, rate=3e-3, rank=4).apply(pruned)
    before, after = held_out(repaired)
    assert after < 0.8 * before
    for name, tensor in stored_tensors(repaired).items():
        if "proj" in name:
            old = tensors[name]
            assert (tensor.numpy()[old == 0] == 0).all()
            assert (tensor.numpy() != old).any()
    assert repaired.parent.path == model.path


def test_training_and_held_out_windows_are_disjoint(tiny: Callable[..., Model]) -> None:
    model = tiny(layers=2)
    plan = Repair(steps=4, tokens=256)._train(model)
    train, held = text(model, plan)
    assert plan.sequence == 128 and plan.steps == 4
    assert len(train) >= 4 and len(held) == 4


def test_the_held_out_score_is_the_kl_to_the_parent(tiny: Callable[..., Model]) -> None:
    damaged = Recipe.parse('gguf(type="q4_0", windows=1)').apply(tiny(layers=2))
    technique = Repair(steps=2, tokens=256)
    _, held = text(damaged, technique._train(damaged))
    lesson = Lesson(damaged, technique._student(damaged, 0), held)
    parent = load_module(damaged)
    with torch.no_grad():
        theirs = torch.log_softmax(parent(torch.as_tensor(held)).logits.double(), -1)
        ours = torch.log_softmax(lesson.student.logits(torch.as_tensor(held)).double(), -1)
    assert lesson.score() == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-3)
