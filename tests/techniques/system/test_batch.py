from __future__ import annotations

import pytest

from fivefold.errors import RecipeError
from fivefold.recipe import Recipe


def test_the_plan_holds_the_size(tiny):
    model = Recipe.parse("batch(size=8)").apply(tiny())
    assert model.run.batch == 8
    with pytest.raises(RecipeError, match="outside"):
        Recipe.parse("batch(size=0)")
