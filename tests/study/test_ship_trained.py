"""Shipping a trained model, merged or with an adapter beside its weights: the copy answers as recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tuning import RECIPE, Run, asked, without_rehearsal

import fivefold
from fivefold.artifact import Artifact
from fivefold.errors import Departure, Misfit, StoreError, UserError
from fivefold.model import Model, Trait, load
from fivefold.recipe import Recipe
from fivefold.study.request import Finished
from fivefold.study.train import train
from fivefold.testing.contract import sentence

pytestmark = pytest.mark.usefixtures("quick")


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def prefixed(pupil: Model, lessons: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    with pytest.MonkeyPatch.context() as patch:
        without_rehearsal(patch)
        return train(asked(pupil, lessons, tmp_path_factory.mktemp("prefix") / "out", recipe="prefix(tokens=4)"))


def test_an_adapter_beside_the_weights_is_a_trait_that_is_missing(prefixed: Finished, pupil: Model) -> None:
    model = load(prefixed.folder / "model")
    assert model.traits == pupil.traits - {Trait.PLAIN_GRAPH} and (model.path / "adapter").is_dir()
    assert model.blueprint.context == pupil.blueprint.context - 4
    with pytest.raises(Misfit, match="no adapter beside the weights") as caught:
        Recipe.parse('gguf(type="q8_0")').check(model)
    sentence(caught.value)
    Recipe.parse("threads(count=1)").check(model)


def test_a_model_with_an_adapter_beside_it_is_not_trained_again(
    prefixed: Finished, lessons: Path, tmp_path: Path
) -> None:
    for recipe in (RECIPE, ""):
        with pytest.raises(UserError, match="adapter beside its weights") as caught:
            train(asked(load(prefixed.folder / "model"), lessons, tmp_path / "out", recipe=recipe))
        sentence(caught.value)


@pytest.mark.parametrize("which", ["finished_run", "prefixed"])
def test_ship_asks_the_copy_the_same(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    found = request.getfixturevalue(which)
    run = (found[0] if which == "finished_run" else found).folder
    shipped = fivefold.ship(run, to=tmp_path / "shipped")
    copy = Artifact.open(tmp_path / "shipped")
    copy.verify()
    recorded = Artifact.open(run / "model").card
    assert copy.card is not None and recorded is not None
    assert copy.card["quantities"]["loss"]["value"] == pytest.approx(recorded["quantities"]["loss"]["value"], abs=1e-5)
    assert {name for name, row in shipped.rows.items() if row[2] == "same"} == set(shipped.rows) - {"perplexity"}
    assert (tmp_path / "shipped" / "model.safetensors").read_bytes() == weights(run)
    assert load(tmp_path / "shipped").traits == load(run / "model").traits
    with pytest.raises(StoreError, match="already exists"):
        fivefold.ship(run, to=tmp_path / "shipped")
    with pytest.raises(UserError, match="one model"):
        fivefold.ship(run, to=tmp_path / "other", trial=1)


def test_ship_refuses_a_copy_that_answers_otherwise(
    finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run[0].folder, run)
    told = json.loads((run / "exam.json").read_text())
    told["rows"] = told["rows"][:3]
    (run / "exam.json").write_text(json.dumps(told))
    with pytest.raises(Departure, match="departs from the run's model in loss") as caught:
        fivefold.ship(run, to=tmp_path / "shipped")
    sentence(caught.value)
    assert not (tmp_path / "shipped").exists()
    (run / "exam.json").unlink()
    with pytest.raises(StoreError, match=r"exam.json is missing") as caught:
        fivefold.ship(run, to=tmp_path / "shipped")
    flip = bytearray(weights(run))
    flip[len(flip) // 2] ^= 1
    (run / "model" / "model.safetensors").write_bytes(bytes(flip))
    (run / "exam.json").write_text(json.dumps(told))
    with pytest.raises(StoreError, match="changed after the artifact was made"):
        fivefold.ship(run, to=tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()
