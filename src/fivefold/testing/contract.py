"""The contract of a technique, as tests. Inherit it and name the techniques; ours covers the whole catalogue.

    class TestMine(TechniqueContract):
        names = ("my_technique",)

A technique declares what it does before it does it; the contract holds it to that: its text teaches, its values spell
and parse, what it refuses it refuses in one sentence and before any work, `plan` foretells what `apply` leaves, `apply`
touches nothing of its input, says what it covered, and leaves a model that can be exported and served with finite
answers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fivefold.errors import RecipeError, UserError
from fivefold.metrics import RESOURCES
from fivefold.model import Model, Trait
from fivefold.recipe import Recipe, Technique, catalogue
from fivefold.space import Dimension, dimensions
from fivefold.study.planned_size import planned_bytes, size_on_disk
from fivefold.study.sampler import SearchSpace
from fivefold.testing.tiny import tiny_examples, tiny_model

SIZE = 0.1
"""Most by which a folder may differ from its planned bytes; a tiny model has more scales and norms per weight."""


def sentence(error: BaseException) -> str:
    """The error's text. Fails unless it is one line that says something."""
    text = str(error)
    assert text and "\n" not in text and "Traceback" not in text, f"not one sentence: {text!r}"
    return text


def content(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file."""
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*")) if f.is_file()
    }


class TechniqueContract:
    """`names` are the techniques to test; empty means the whole catalogue."""

    names: tuple[str, ...] = ()

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "name" in metafunc.fixturenames:
            metafunc.parametrize("name", self.names or tuple(catalogue()))

    @pytest.fixture(scope="class")
    @classmethod
    def parent(cls, tmp_path_factory: pytest.TempPathFactory) -> Model:
        folder = tmp_path_factory.mktemp("tiny")
        model = tiny_model(folder / "parent")
        examples = tiny_examples(folder / "examples.jsonl")
        return model.but(train=dataclasses.replace(model.train, data=examples, steps=2, tokens_per_step=256))

    @pytest.fixture(scope="class")
    @classmethod
    def space(cls, parent: Model) -> SearchSpace:
        return SearchSpace.build(parent, batch=8)

    def test_its_text_teaches(self, name: str) -> None:
        technique = catalogue()[name]
        text = inspect.getdoc(importlib.import_module(technique.__module__)) or ""
        assert len(text.splitlines()[0]) <= 120 and len(text) > 300, "the file opens with the idea"
        assert "Source" in text, "the file names where the idea comes from"
        for dimension in fields_of(technique):
            assert dimension.help, f"{name}.{dimension.name} has no help under it"

    def test_its_declarations_use_known_words(self, name: str) -> None:
        technique = catalogue()[name]
        assert technique.needs <= set(Trait) and technique.breaks <= set(Trait)
        assert set(technique.lowers) <= set(RESOURCES) and set(technique.lowers.values()) <= {"direct", "indirect"}
        assert set(technique.may_raise) <= {*RESOURCES, "quality"}
        assert dataclasses.is_dataclass(technique) and technique.__dataclass_params__.frozen  # type: ignore[attr-defined]

    def test_its_values_spell_and_parse(self, name: str) -> None:
        for one in some(name):
            assert Recipe.parse(str(one)) == Recipe(one) and str(Recipe.parse(str(one))) == str(Recipe(one))
            assert hash(one) == hash(type(one)(**vars(one)))

    def test_it_refuses_values_outside_its_range(self, name: str) -> None:
        one = next(some(name))
        for dimension in fields_of(type(one)):
            wrong: Any
            for wrong in ([], "no such value", -(10**12)):
                with pytest.raises(RecipeError) as caught:
                    dataclasses.replace(one, **{dimension.name: wrong})
                sentence(caught.value)

    def test_it_refuses_in_one_sentence_and_its_plan_is_pure(self, name: str, parent: Model) -> None:
        before = content(parent.path)
        for one in some(name):
            try:
                planned = Recipe(one).plan(parent)
            except UserError as error:
                sentence(error)
                continue
            assert planned.path == parent.path and planned.traits == parent.traits - one.breaks
        assert content(parent.path) == before

    def test_it_does_what_it_planned(self, name: str, parent: Model, space: SearchSpace, tmp_path: Path) -> None:
        recipe = working(name, space)
        before = content(parent.path)
        done = applied(recipe, parent, tmp_path / "one")
        assert content(parent.path) == before, "apply changed its input"
        planned = recipe.plan(parent)
        assert done.blueprint == planned.blueprint and done.run == planned.run
        assert dataclasses.replace(done.decode, draft=None) == planned.decode
        assert done.traits == planned.traits
        assert (done.export.format, done.format) in ((planned.export.format, planned.format), ("gguf", "gguf"))
        if done.format == planned.export.format == "safetensors" and recipe.build.techniques:
            written, _ = planned_bytes(parent, planned)
            assert size_on_disk(done) == pytest.approx(written, rel=SIZE), "the file is as large as the plan says"
        if catalogue()[name].runtime:
            assert recipe.build.techniques or done.path == parent.path
        else:
            assert done.coverage, "a technique that builds says what it covered"

    def test_what_it_makes_is_served(self, name: str, parent: Model, space: SearchSpace, tmp_path: Path) -> None:
        from fivefold.engines import open_session
        from fivefold.export import export

        recipe = working(name, space)
        (tmp_path / "file").mkdir()
        served = applied(recipe.build, parent, tmp_path / "one")
        if recipe.build.techniques:
            served = export(served, tmp_path / "file")
        for technique in recipe.runtime:
            served = technique.apply(served).without(*technique.breaks)
        session = open_session(served)
        try:
            scores = session.score(list(range(5, 37)))
            answer = list(session.generate(list(range(5, 37)), 8))
        finally:
            session.close()
        assert scores.shape == (32, session.vocab) and math.isfinite(float(abs(scores).max()))
        assert len(answer) == 8


def some(name: str) -> Iterator[Technique]:
    """A few values of the technique: each searched value of each field once."""
    technique = catalogue()[name]
    rng = random.Random(name)
    first = {d.name: rng.choice(values_of(d)) for d in fields_of(technique) if d.required}
    yield technique(**first)
    for dimension in fields_of(technique):
        if dimension.searched:
            for value in values_of(dimension):
                yield technique(**{**first, dimension.name: value})


def fields_of(technique: type) -> tuple[Dimension, ...]:
    return dimensions(technique)


def values_of(dimension: Dimension) -> tuple[Any, ...]:
    from fivefold.study.sampler import grid

    return grid(dimension) if dimension.searched else (dimension.legal or (dimension.default,))


def working(name: str, space: SearchSpace) -> Recipe:
    """A recipe that holds the technique and fits the tiny model; skips with the reason when there is none."""
    if name not in space.levels:
        pytest.skip(space.dropped.get(name, "it fits no tiny model"))
    for setting in space.variants(name):
        for partner in ({}, {"gguf": {"type": "q8_0"}}, {"wanda": {"sparsity": 0.5}}, {"prune_depth": {"layers": 1}}):
            recipe = space.recipe({**partner, name: setting})
            if recipe is not None:
                return recipe
    pytest.skip(f"no setting of {name} fits the tiny model alone, with gguf, wanda or prune_depth")


def applied(recipe: Recipe, parent: Model, work: Path) -> Model:
    work.mkdir(parents=True, exist_ok=True)
    return recipe.apply(parent.but(work=work))
