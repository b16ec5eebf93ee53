from __future__ import annotations

import numpy as np
import pytest

from fivefold.engines import open_session
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.recipe import Recipe
from fivefold.weights import read_tensors


def brute_force(weight: np.ndarray, packed: np.ndarray, scale: np.ndarray, zero: np.ndarray, group: int) -> np.ndarray:
    """The matrix the packed numbers stand for, one weight at a time."""
    out = np.empty_like(weight)
    for i, j in np.ndindex(weight.shape):
        byte = int(packed[i, j // 2])
        q = byte >> 4 if j % 2 else byte & 15
        out[i, j] = (q - 8) * scale[i, j // group] + zero[i, j // group]
    return out


@pytest.mark.parametrize("group", [32, 64])
def test_every_weight_is_within_half_a_step_of_its_group(tiny, group):
    model = tiny("llama", layers=1)
    done = Recipe.parse(f"int4(group={group})").apply(model)
    assert done.coverage[-1] == f"int4: 7 of 7 linear layers in groups of {group}; embedding and head kept"
    after = dict(read_tensors(done.path))
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"):
        weight = dict(read_tensors(model.path))[f"{module}.weight"].numpy()
        scale, zero = after[f"{module}.scale"].numpy(), after[f"{module}.zero"].numpy()
        got = brute_force(weight, after[f"{module}.qweight"].numpy(), scale, zero, group)
        steps = np.repeat(scale, group, 1)
        slack = np.abs(np.repeat(zero, group, 1)) * 2**-8 + 8 * steps * 2**-8
        assert (np.abs(got - weight) <= steps / 2 + slack).all()


def test_widths_that_do_not_fit_are_refused_or_treated_as_told(tiny):
    model = tiny("llama", layers=1)
    with pytest.raises(Misfit, match=r"does not fit 6 of 7 linear layers.*multiple of 128 and rows of 16; .*group=64"):
        Recipe.parse("int4(group=128)").check(model)
    assert not model.work.exists()
    kept = Recipe.parse('int4(group=128, fallback="keep")').apply(model)
    assert kept.coverage[-1] == (
        "int4: 1 of 7 linear layers in groups of 128; 6 kept because rows of 64 do not fit; embedding and head kept"
    )
    mixed = Recipe.parse('int4(group=128, fallback="int8", head="int8")').apply(model)
    assert "6 in 8 bits" in mixed.coverage[-1]
    assert "embedding and head in 8 bits" in mixed.coverage[-1]
    names = dict(read_tensors(mixed.path))
    assert names["model.layers.0.self_attn.q_proj.qweight"].dtype == "I8"
    assert "model.embed_tokens.qweight" in names


@pytest.mark.parametrize("recipe", ["int4", 'int4(group=32, head="int8")', 'int4(group=128, fallback="int8")'])
def test_the_engine_runs_it_and_8_bits_are_nearer(tiny, tmp_path, recipe):
    model = tiny("qwen2")

    def score(text: str) -> np.ndarray:
        planned = Recipe.parse(text).apply(model)
        session = open_session(export(planned, tmp_path / str(abs(hash(text)))))
        try:
            return session.score(range(32))
        finally:
            session.close()

    want = score("parent")
    divergence = [float((np.exp(want) * (want - score(r))).sum(-1).mean()) for r in ("int8", recipe)]
    assert 0 < divergence[0] < divergence[1] < 0.1
