"""Keys of artifacts: whatever decides the result is in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from made_up import machine

from fivefold.engines import _type_speed
from fivefold.model import Model
from fivefold.recipe import Recipe
from fivefold.study.build import Builder
from fivefold.techniques.inference.mixed_precision import MixedPrecision


@dataclass
class Table:
    digest: str


def test_what_a_technique_was_given_is_in_the_key(
    bare: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_type_speed, "known", lambda blueprint: None)

    def keys(digest: str, time: float) -> list[str]:
        monkeypatch.setattr(_type_speed, "measured", lambda blueprint: Table(digest))
        recipe = (*Recipe.parse("prune_depth(layers=1)").techniques, MixedPrecision(bits=5.5, time=time))
        return Builder(tmp_path, machine()).keys(Recipe(*recipe), bare)

    limited, same, other = keys("a", 0.9), keys("a", 0.9), keys("b", 0.9)
    assert limited == same and limited[0] == other[0] and limited[1] != other[1]
    assert keys("a", 0.0) == keys("b", 0.0), "without a limit the table decides nothing"
