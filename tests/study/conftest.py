"""The made-up model, and a tiny one with rows it can learn and a run of it: made once per session."""

from pathlib import Path

import pytest
from made_up import bare_model
from tuning import Run, asked, heard, without_rehearsal

from fivefold.model import Model, load
from fivefold.testing import tiny_model
from fivefold.testing.tiny import tiny_examples


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return bare_model(tmp_path_factory.mktemp("bare") / "model")


@pytest.fixture(scope="session")
def pupil(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Two layers, context 256, loaded as a person's own model is."""
    return load(tiny_model(tmp_path_factory.mktemp("pupil") / "model", layers=2, vocab=257, context=256).path)


@pytest.fixture(scope="session")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_examples(tmp_path_factory.mktemp("lessons") / "rows.jsonl", 160)


@pytest.fixture(scope="session")
def finished_run(pupil: Model, lessons: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What a run of 12 steps left and told. Not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        without_rehearsal(patch)
        return heard(asked(pupil, lessons, tmp_path_factory.mktemp("run") / "out", "memory<=4GB", task="accuracy"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_rehearsal(monkeypatch)
