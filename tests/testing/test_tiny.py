"""The tiny model is a real one: loads, tokenizes, runs in torch and llama.cpp, and is the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fivefold.engines import open_session
from fivefold.errors import FivefoldError
from fivefold.export import export
from fivefold.model import ExportPlan
from fivefold.testing import tiny_model
from fivefold.testing.contract import content
from fivefold.testing.tiny import FAMILIES, TEXT
from fivefold.tokenizer import Tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_it_loads_and_its_tokenizer_is_its_own(family: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m", family)
    tokenizer = Tokenizer(model.path)
    assert tokenizer.vocab == model.blueprint.vocab and model.blueprint.family == family
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT and len(tokenizer.encode(TEXT)) < len(TEXT)
    assert tokenizer.stop == {0}
    assert len(tokenizer.encode((model.path / "calibration.txt").read_text())) > 8192


def test_same_arguments_same_files(tmp_path: Path) -> None:
    a, b = (tiny_model(tmp_path / n) for n in "ab")
    assert content(a.path) == content(b.path)
    assert content(tiny_model(tmp_path / "c", seed=1).path) != content(a.path)


def test_engines_agree_on_it(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    file = export(model.but(export=ExportPlan(format="gguf", default="f32")), tmp_path / "file")
    tokens = list(range(10, 60))
    scores = []
    for one in (model, file):
        session = open_session(one)
        scores.append(session.score(tokens))
        session.close()
    assert np.abs(scores[0] - scores[1]).max() < 5e-3
    assert scores[0].std() > 0.3, "its answers are not all alike"


def test_an_unknown_family_is_told(tmp_path: Path) -> None:
    with pytest.raises((ValueError, FivefoldError), match="families"):
        tiny_model(tmp_path / "m", "bert")
