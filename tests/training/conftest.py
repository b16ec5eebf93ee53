"""One tiny model for all tests of training, and a cache folder of their own."""

from __future__ import annotations

import pytest

from fivefold.model import Model
from fivefold.testing import tiny_model


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Two layers, context 256; its tokens are bytes, and id 0 ends a turn. Not to be changed."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "llama", layers=2, vocab=257, context=256)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
