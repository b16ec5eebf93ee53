from __future__ import annotations

import numpy as np
import pytest

from fivefold.engines import open_session
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.recipe import Recipe
from fivefold.weights import read_tensors


def scores(model, folder):
    session = open_session(export(model, folder))
    try:
        return session.score(range(32))
    finally:
        session.close()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_linear_layer_is_rounded_to_its_row_scale(tiny, family):
    model = tiny(family)
    done = Recipe.parse("int8").apply(model)
    assert done.coverage[-1] == "int8: 21 of 21 linear layers; embedding and head kept"
    before, after = dict(read_tensors(model.path)), dict(read_tensors(done.path))
    for name, tensor in before.items():
        if ".layers." not in name or len(tensor.shape) != 2:
            np.testing.assert_array_equal(after[name].numpy(), tensor.numpy())
            continue
        module = name.removesuffix(".weight")
        weight, q = tensor.numpy(), after[f"{module}.qweight"].numpy()
        scale = after[f"{module}.scale"].numpy()[:, None]
        assert q.dtype == np.int8
        np.testing.assert_allclose(scale[:, 0], np.abs(weight).max(1) / 127, rtol=2**-8)
        assert (np.abs(q * scale - weight) <= scale * 1.0001 * np.where(np.abs(q) == 127, 1, 0.5)).all()


@pytest.mark.parametrize("recipe", ["int8", 'int8(head="int8")'])
def test_the_engine_runs_it_and_answers_move_little(tiny, tmp_path, recipe):
    model = tiny("qwen2")
    want = scores(model, tmp_path / "parent")
    got = scores(Recipe.parse(recipe).apply(model), tmp_path / "out")
    assert 0 < np.abs(np.exp(got) - np.exp(want)).max() < 2e-3


def test_conv1d_families_are_refused_before_work(tiny):
    with pytest.raises(Misfit, match=r"no linear layers in a model of gpt2; use gguf"):
        Recipe.parse("int8").check(tiny("gpt2"))


def test_it_does_not_meet_another_quantizer(tiny):
    with pytest.raises(Misfit, match="float weights"):
        Recipe.parse('int8 + gguf(type="q8_0")')
