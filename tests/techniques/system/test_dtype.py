from __future__ import annotations

import numpy as np
import pytest

from fivefold.engines import open_session
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.recipe import Recipe


def test_the_plan_holds_the_type(tiny):
    assert Recipe.parse('dtype(type="bfloat16")').apply(tiny()).run.dtype == "bfloat16"


def test_llama_cpp_follows_its_file(tiny):
    for recipe in ('dtype(type="bfloat16") + gguf(type="q8_0")',
                   'dtype(type="bfloat16") + gguf(type="q8_0") + engine(type="llama.cpp")'):
        with pytest.raises(Misfit, match=r"llama\.cpp computes in the types of its file"):
            Recipe.parse(recipe).check(tiny())


def test_torch_computes_in_it(tiny, tmp_path):
    scores = {}
    for kind in ("float32", "bfloat16"):
        session = open_session(export(Recipe.parse(f'dtype(type="{kind}")').apply(tiny()), tmp_path / kind))
        assert session.describe()["dtype"] == kind
        scores[kind] = session.score(range(32))
        session.close()
    apart = np.abs(np.exp(scores["float32"]) - np.exp(scores["bfloat16"])).max()
    assert 0 < apart < 0.02
