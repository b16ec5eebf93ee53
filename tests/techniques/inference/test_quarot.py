from __future__ import annotations

import numpy as np
import pytest
import torch

from fivefold.errors import Misfit
from fivefold.recipe import Recipe
from fivefold.techniques._shared.rotation import HEAD, hadamard, random_rotation
from fivefold.techniques.inference.quarot import Quarot
from fivefold.training.module import load_module
from fivefold.weights import read_tensors, write_safetensors


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return load_module(model, torch.float32)(torch.arange(2, 60)[None]).logits[0].numpy()


def stored(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in read_tensors(model.path)}


def replaced(model, changes):
    write_safetensors(model.path / "model.safetensors", {**stored(model), **changes})
    return model


def kurtosis(values: np.ndarray) -> float:
    centred = values - values.mean()
    return float((centred**4).mean() / (centred**2).mean() ** 2)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 28, 36, 64, 72, 96, 144, 576, 896])
def test_hadamard_matrices_are(n):
    found = hadamard(n)
    assert found is not None and set(np.unique(found)) <= {-1, 1}
    np.testing.assert_array_equal(found.astype(int) @ found.astype(int).T, n * np.eye(n, dtype=int))


@pytest.mark.parametrize("n", [3, 40, 50, 64, 88, 92, 184])
def test_every_width_has_an_orthogonal_rotation_that_spreads(n):
    turn = random_rotation(n, torch.Generator().manual_seed(1)).numpy()
    np.testing.assert_allclose(turn @ turn.T, np.eye(n), atol=1e-12)
    if hadamard(n) is not None:
        np.testing.assert_allclose(np.abs(turn), n**-0.5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("residual", [True, False])
def test_the_function_is_the_parents(tiny, family, tied, residual):
    model = tiny(family, tied=tied)
    done = Quarot(residual=residual).apply(model)
    np.testing.assert_allclose(logits(done), logits(model), atol=1e-4)
    before, after = stored(model), stored(done)
    turned = {n for n in before if not np.allclose(before[n], after[n], atol=1e-3)}
    assert "model.layers.1.self_attn.v_proj.weight" in turned
    assert ("model.embed_tokens.weight" in turned) == residual
    assert ("model.layers.0.mlp.down_proj.weight" in turned) == residual


def test_each_matrix_is_what_the_algebra_says(tiny):
    """Oracle: plain numpy on one layer, Q and R read off the embedding and v_proj."""
    model = tiny("qwen2", tied=False)
    before, after = stored(model), stored(Quarot().apply(model))
    q = np.linalg.lstsq(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"], rcond=None)[0].T
    np.testing.assert_allclose(q @ q.T, np.eye(64), atol=1e-4)
    at = "model.layers.1."
    gain = before[f"{at}post_attention_layernorm.weight"]
    np.testing.assert_allclose(
        after[f"{at}mlp.up_proj.weight"], before[f"{at}mlp.up_proj.weight"] * gain @ q.T, atol=1e-4
    )
    np.testing.assert_allclose(after[f"{at}mlp.down_proj.weight"], q @ before[f"{at}mlp.down_proj.weight"], atol=1e-4)
    np.testing.assert_array_equal(after[f"{at}post_attention_layernorm.weight"], 1)
    np.testing.assert_array_equal(after["model.norm.weight"], 1)
    np.testing.assert_allclose(after[HEAD], before[HEAD] * before["model.norm.weight"] @ q.T, atol=1e-4)
    r = np.linalg.lstsq(
        (before[f"{at}self_attn.v_proj.weight"] * before[f"{at}input_layernorm.weight"] @ q.T).T,
        after[f"{at}self_attn.v_proj.weight"].T, rcond=None,
    )[0].T
    np.testing.assert_allclose(r @ before[f"{at}self_attn.v_proj.bias"], after[f"{at}self_attn.v_proj.bias"], atol=1e-4)
    o = before[f"{at}self_attn.o_proj.weight"]
    want = q @ np.concatenate([o[:, i : i + 32] @ r.T for i in range(0, 64, 32)], 1)
    np.testing.assert_allclose(after[f"{at}self_attn.o_proj.weight"], want, atol=1e-4)


def test_a_tied_head_stays_tied_only_where_the_last_gain_is_one_number(tiny):
    varied = tiny("llama", tied=True)
    planned, done = Quarot().plan(varied), Quarot().apply(varied)
    assert not planned.blueprint.tied and done.blueprint == planned.blueprint
    weights = 257 * 64
    assert f"{weights} weights more, {4 * weights} bytes as stored" in done.coverage[-1]
    constant = replaced(tiny("llama", tied=True), {"model.norm.weight": np.full(64, 1.7, np.float32)})
    planned, done = Quarot().plan(constant), Quarot().apply(constant)
    assert planned.blueprint.tied and done.blueprint == planned.blueprint
    assert HEAD not in stored(done) and "of its own" not in done.coverage[-1]
    np.testing.assert_allclose(logits(done), logits(constant), atol=1e-4)


def test_outliers_are_spread_and_the_rounding_error_falls(tiny):
    from fivefold.engines._quantize import dequantize, quantize

    model = tiny("llama", tied=False)
    spiky = {n: t.copy() for n, t in stored(model).items() if n.endswith("up_proj.weight")}
    for matrix in spiky.values():
        matrix[:, [5, 40]] *= 12
    model = replaced(model, spiky)
    before, after = stored(model), stored(Quarot().apply(model))

    def lost(matrix: np.ndarray) -> float:
        error = dequantize(quantize(matrix, "q4_0"), "q4_0", matrix.shape) - matrix
        return float((error**2).sum() / (matrix**2).sum())

    for name in spiky:
        assert kurtosis(before[name]) > 20 and kurtosis(after[name]) < 4
        assert lost(after[name]) < 0.6 * lost(before[name])


def test_it_comes_before_what_rounds_or_zeroes_and_refuses_other_families(tiny):
    recipe = Recipe.parse('gguf(type="q4_0") + quarot')
    assert [t.name for t in recipe] == ["quarot", "gguf"]
    assert [t.name for t in Recipe.parse("wanda + quarot")] == ["quarot", "wanda"]
    with pytest.raises(Misfit, match="cannot turn gpt2"):
        Quarot().check(tiny("gpt2"))


def test_llama_cpp_runs_it_like_the_parent(tiny, tmp_path):
    from dataclasses import replace

    from fivefold.engines import open_session
    from fivefold.export import export

    model = tiny("llama", tied=True)
    scores = []
    for i, one in enumerate((model, Quarot().apply(model))):
        file = export(one.but(export=replace(one.export, format="gguf", default="f32")), tmp_path / str(i))
        session = open_session(file)
        scores.append(session.score(list(range(2, 60))))
        session.close()
    np.testing.assert_allclose(scores[1], scores[0], atol=2e-2)
