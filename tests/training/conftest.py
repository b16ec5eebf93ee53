"""One tiny model for all tests of training, and a cache folder of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fivefold.model import Model
from fivefold.testing import tiny_model
from fivefold.tokenizer import Tokenizer
from fivefold.training.data import Examples, read


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Two layers, context 256; its tokens are bytes, and id 0 ends a turn. Not to be changed."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "llama", layers=2, vocab=257, context=256)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def bytewise(tiny_llama: Model) -> Tokenizer:
    return Tokenizer(tiny_llama.path)


@pytest.fixture
def file(tmp_path: Path, bytewise: Tokenizer) -> Callable[..., Examples]:
    """file(content, name="rows.jsonl", **more): the examples in it; rows may be given as objects."""

    def read_it(content: Any, name: str = "rows.jsonl", **more: Any) -> Examples:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return read(tmp_path / name, more.pop("tokenizer", bytewise), more.pop("context", 256), **more)

    return read_it
