from __future__ import annotations

import numpy as np
import pytest

from fivefold.engines import open_session
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.recipe import Recipe


def test_the_cache_shrinks_as_its_bits_say_and_answers_move_little(tiny, tmp_path):
    parent = tiny()
    scores, sizes = {}, {}
    for kind in ("f16", "q8_0", "q4_0"):
        planned = Recipe.parse(f'gguf(type="f32") + kv_cache(type="{kind}")').apply(parent)
        session = open_session(export(planned, tmp_path / kind))
        scores[kind] = session.score(range(64))
        sizes[kind] = session.describe()["cache_bytes_per_token"]
        session.close()
    assert sizes["q8_0"] / sizes["f16"] == pytest.approx(8.5 / 16)
    assert sizes["q4_0"] / sizes["f16"] == pytest.approx(4.5 / 16)
    small, large = (np.abs(scores[k] - scores["f16"]).max() for k in ("q8_0", "q4_0"))
    assert 0 < small < large < 1


def test_heads_that_do_not_hold_whole_blocks_are_refused_before_work(tiny):
    parent = tiny(width=32)
    with pytest.raises(Misfit, match='heads of 16 elements are not a multiple of 32; choose "f16"'):
        Recipe.parse('gguf(type="q8_0") + kv_cache(type="q4_0")').check(parent)
    Recipe.parse('gguf(type="q8_0") + kv_cache(type="bf16")').check(parent)
