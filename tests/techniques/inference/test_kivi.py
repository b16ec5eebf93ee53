from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fivefold.engines import open_session
from fivefold.errors import Misfit
from fivefold.machine import Machine
from fivefold.meters.memory import cache_bytes
from fivefold.model import DecodePlan
from fivefold.recipe import Recipe
from fivefold.study.predictor import Predictor

TEXT = [int(i) for i in np.random.default_rng(0).integers(1, 250, 100)]


def session(parent, recipe: str, lookup: int = 0):
    model = Recipe.parse(recipe).apply(parent)
    return open_session(model.but(decode=DecodePlan(lookup_ngram=1, lookup_tokens=lookup)))


def kl(exact: np.ndarray, other: np.ndarray) -> float:
    return float((np.exp(exact) * (exact - other)).sum(1).mean())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_text_within_the_residual_is_served_bit_for_bit(tiny, family):
    parent = tiny(family)
    exact, packed = session(parent, "parent"), session(parent, "kivi(bits=2, residual=100)")
    np.testing.assert_array_equal(packed.score(TEXT), exact.score(TEXT))
    assert list(packed.generate(TEXT[:60], 30)) == list(exact.generate(TEXT[:60], 30))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fewer_bits_are_further_away_and_scores_are_those_of_decoding_token_by_token(tiny, family):
    parent = tiny(family)
    exact = session(parent, "parent").score(TEXT)
    far = []
    for bits in (8, 4, 2):
        opened = session(parent, f"kivi(bits={bits}, group=16, residual=16)")
        far.append(kl(exact, opened.score(TEXT)))
        cache, rows = None, []
        for token in TEXT:
            logits, cache = opened._forward([[token]], cache, keep=1)
            rows.append(logits[0, 0] - np.logaddexp.reduce(logits[0, 0]))
        assert kl(np.array(rows), opened.score(TEXT)) < 0.02 * far[-1] + 1e-6
    assert 0 < far[0] < far[1] < far[2]


def test_drafts_batches_and_repetition_give_the_same_text(tiny):
    parent = tiny()
    plain = session(parent, "kivi(bits=8, group=16, residual=16)")
    want = list(plain.generate(TEXT[:50], 40))
    assert list(plain.generate(TEXT[:50], 40)) == want
    assert list(session(parent, "kivi(bits=8, group=16, residual=16)", lookup=6).generate(TEXT[:50], 40)) == want
    alone = list(plain.generate(TEXT[:29], 40))
    assert plain.generate_batch([TEXT[:50], TEXT[:29]], 40) == [want, alone]


def test_bytes_per_token_are_the_same_for_session_meter_and_forecast(tiny):
    parent = tiny()
    parent = parent.but(run=replace(parent.run, context=112))
    recipe = Recipe.parse("kivi(bits=2, group=16, residual=32)")
    described = open_session(recipe.apply(parent)).describe()
    assert described["cache_type"] == "kivi2-g16-r32"
    shape = parent.blueprint
    elements = 2 * shape.layers * shape.kv_heads * shape.head_dim
    want = elements * (80 * (2 / 8 + 2 * 2 / 16) + 32 * 4) / 112
    assert described["cache_bytes_per_token"] == pytest.approx(want)
    assert cache_bytes(recipe.apply(parent), {}).value == pytest.approx(want)
    assert Predictor(Machine.probe(), parent).physics(recipe)["kv"] == pytest.approx(want)


def test_what_does_not_fit_is_refused_before_work(tiny, tmp_path):
    parent = tiny()
    with pytest.raises(Misfit, match=r"served by llama\.cpp; use kv_cache\(type=\.\.\.\)"):
        Recipe.parse('gguf(type="q8_0") + kivi(bits=2)').check(parent)
    with pytest.raises(Misfit, match="needs full-precision key-value cache, which kv_cache"):
        Recipe.parse('kivi(bits=2) + kv_cache(type="q8_0")')
    with pytest.raises(Misfit, match="heads of 32 elements are not a multiple of its group of 64"):
        Recipe.parse("kivi(bits=2, group=64)").check(parent)
    with pytest.raises(Misfit, match="never pack a token of a context of 128"):
        Recipe.parse("kivi(bits=2)").check(parent.but(run=replace(parent.run, context=128)))
    file = parent.path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sliding_window": 64}))
    with pytest.raises(Misfit, match=r"keeps others .its config sets sliding_window.; remove kivi"):
        Recipe.parse("kivi(bits=2)").check(parent)
