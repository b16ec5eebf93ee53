"""Tiny random models of several families, whose tokens are bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fivefold.model import Model
from fivefold.testing import tiny_model


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Model]:
    """tiny(family="llama", tied=True, layers=3, width=64): context 128, with a calibration text and scratch folder."""

    def make(family: str = "llama", tied: bool = True, layers: int = 3, width: int = 64) -> Model:
        folder = tmp_path / f"{family}-{tied}-{layers}-{width}"
        model = tiny_model(folder, family, tied=tied, layers=layers, width=width, vocab=257, context=128)
        return model.but(work=tmp_path / "work")

    return make
