from __future__ import annotations

import pytest

from fivefold.errors import Misfit
from fivefold.recipe import Recipe


def test_the_plan_holds_the_type(tiny):
    assert Recipe.parse('dtype(type="bfloat16")').apply(tiny()).run.dtype == "bfloat16"


def test_it_belongs_to_torch_alone(tiny):
    with pytest.raises(Misfit, match="needs torch graph"):
        Recipe.parse('dtype(type="bfloat16") + gguf(type="q8_0")')
    with pytest.raises(Misfit):
        Recipe.parse('dtype(type="bfloat16") + engine(type="llama.cpp")').check(tiny())
