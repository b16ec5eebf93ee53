"""Speculative decoding as a technique: what it plans, makes, ships and refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fivefold.artifact import Artifact
from fivefold.engines import open_session
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.machine import Machine
from fivefold.meters.memory import weight_bytes
from fivefold.model import ExportPlan, Model, load
from fivefold.recipe import Recipe
from fivefold.study.build import Builder
from fivefold.study.planned_size import planned_bytes

Tiny = Callable[..., Model]


def test_an_artifact_carries_its_draft_wherever_it_is_copied(tiny: Tiny, tmp_path: Path) -> None:
    parent = tiny()
    built = Builder(tmp_path / "store", Machine.probe()).build(
        Recipe.parse('speculative(draft="q8_0", tokens=3) + gguf(type="f16")'), parent)
    assert built.artifact is not None
    copy = built.artifact.write_copy(tmp_path / "copy")
    shutil.rmtree(tmp_path / "store")
    moved = load(copy.path)
    assert moved.decode.draft == tmp_path / "copy" / "draft.gguf" and moved.decode.draft_tokens == 3
    assert "draft.gguf" in Artifact.open(copy.path).manifest["files"]
    session = open_session(moved)
    assert len(list(session.generate([1, 2, 3], 8))) == 8
    session.close()


def test_its_size_counts_both_files_and_is_planned(tiny: Tiny, tmp_path: Path) -> None:
    parent = tiny()
    recipe = Recipe.parse('speculative(draft="q8_0")')
    done = export(recipe.apply(parent), tmp_path / "out")
    both = (tmp_path / "out" / "model.safetensors").stat().st_size + (tmp_path / "out" / "draft.gguf").stat().st_size
    assert weight_bytes(done).value == both
    assert planned_bytes(parent, recipe.plan(parent))[0] == pytest.approx(both, rel=0.2)


def test_a_file_drafts_and_one_with_other_tokens_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    parent = tiny()
    small = export(tiny(layers=1).but(export=ExportPlan(format="gguf", default="q8_0")), tmp_path / "small")
    done = export(Recipe.parse(f'speculative(file="{small.path}")').apply(parent), tmp_path / "out")
    session, alone = open_session(done), open_session(parent)
    assert list(session.generate([1, 2, 3], 12)) == list(alone.generate([1, 2, 3], 12))
    session.close()
    other = tmp_path / "other"
    shutil.copytree(parent.path, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"!"', '"¡¡"'))
    odd = export(load(other).but(export=ExportPlan(format="gguf", default="q8_0")), tmp_path / "odd")
    with pytest.raises(Misfit, match="another tokenizer"):
        Recipe.parse(f'speculative(file="{odd.path}")').check(parent)
    with pytest.raises(Misfit, match="there is no file"):
        Recipe.parse(f'speculative(file="{tmp_path}/none.gguf")').check(parent)


def test_an_engine_that_takes_no_draft_is_refused(tiny: Tiny) -> None:
    with pytest.raises(Misfit):
        Recipe.parse('speculative + gguf(type="q8_0") + engine(type="openvino")').check(tiny())
