from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from scipy.stats import spearmanr

from fivefold.engines._quantize import dequantize, quantize, types
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.recipe import Recipe
from fivefold.techniques._shared.gguf_types import NEEDS_IMPORTANCE, bits, block, matrices
from fivefold.techniques.inference.gguf import Gguf, Type
from fivefold.weights import check_safetensors, gguf_header, read_tensors


def stored(model, name):
    tensor = next(t for t in gguf_header(model.path).tensors if t.name == name)
    with model.path.open("rb") as file:
        file.seek(tensor.offset)
        return tensor, file.read(tensor.nbytes)


def test_every_type_the_engine_runs_can_be_chosen():
    known = types()
    assert set(get_args(Type)) == set(known) - {"nvfp4", "q1_0", "q2_0"}
    for name in get_args(Type):
        assert (block(name), bits(name)) == (known[name].block, known[name].bits)
        assert not known[name].needs_importance or name in NEEDS_IMPORTANCE


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("recipe", ['gguf(type="q4_0")', 'gguf(type="q5_1", embedding="q8_0")'])
def test_every_matrix_gets_its_type(tiny, tmp_path, family, recipe):
    parent = tiny(family)
    model = Recipe.parse(recipe).apply(parent)
    done = export(model, tmp_path / "out")
    kinds = {t.name: t.type.lower() for t in gguf_header(done.path).tensors if t.name in matrices(parent)}
    embedding = kinds.pop("token_embd.weight")
    wanted = Recipe.parse(recipe).techniques[0]
    assert set(kinds.values()) == {wanted.type}
    assert embedding == (wanted.type if wanted.embedding == "same" else wanted.embedding)
    assert f"of {len(kinds) + 1} matrices" in model.coverage[-1]


def test_importance_reaches_the_file_and_lowers_the_weighted_error(tiny, tmp_path):
    parent = tiny("qwen2")
    name, source = "blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"
    weight = dict(read_tensors(parent.path))[source].numpy()
    with_it = Gguf(type="q4_0", windows=2).apply(parent)
    vector = check_safetensors(with_it.export.importance)[name].numpy()
    _, data = stored(export(with_it, tmp_path / "with"), name)
    assert data == quantize(weight, "q4_0", vector).tobytes()
    without = Gguf(type="q4_0", importance=False).apply(parent)
    assert without.export.importance is None
    _, plain = stored(export(without, tmp_path / "without"), name)
    assert plain == quantize(weight, "q4_0").tobytes()

    def error(blob: bytes) -> float:
        return float((vector * (dequantize(blob, "q4_0", weight.shape) - weight) ** 2).sum())

    assert error(data) < 0.95 * error(plain)


def test_8_bits_need_no_calibration(tiny):
    model = Gguf(type="q8_0").apply(tiny().but(calibration=None))
    assert model.export.importance is None
    assert model.coverage[-1] == "gguf q8_0: 22 of 22 matrices"


def test_a_width_that_does_not_fit_is_refused_before_work_or_falls_back_and_says_so(tiny, tmp_path):
    parent = tiny(width=128)
    with pytest.raises(Misfit, match=r"19 of 22 matrices have rows of 128, not a multiple of q4_k's 256; give fallb"):
        Recipe.parse('gguf(type="q4_k")').check(parent)
    assert not parent.work.exists()
    with pytest.raises(Misfit, match="rows of 128"):
        Recipe.parse('gguf(type="q8_0", embedding="q6_k")').check(parent)
    model = Recipe.parse('gguf(type="q4_k", embedding="q8_0", fallback="q5_0", importance=False)').apply(parent)
    assert model.coverage == (
        "gguf q4_k: 3 of 22 matrices; embedding q8_0; 18 written as q5_0 because 128 is not a multiple of 256",
    )
    kinds = {t.name: t.type for t in gguf_header(export(model, tmp_path / "out").path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q4_K"
    assert (kinds["blk.0.attn_q.weight"], kinds["token_embd.weight"]) == ("Q5_0", "Q8_0")


def test_types_below_3_bits_need_importance(tiny):
    parent = tiny(width=256)
    with pytest.raises(Misfit, match="iq2_xxs needs to know which columns matter"):
        Recipe.parse('gguf(type="iq2_xxs", importance=False)').check(parent)


def test_llama_cpp_runs_every_type_and_more_bits_are_nearer_to_the_parent(tiny, tmp_path):
    from fivefold.engines import open_session

    parent = tiny("llama", width=256, layers=1)
    calibrated = Gguf(type="q4_0", windows=2).apply(parent).export.importance

    def score(kind: str) -> np.ndarray:
        planned = Gguf(type=kind).plan(parent)
        planned = planned.but(export=replace(planned.export, importance=calibrated))
        session = open_session(export(planned, tmp_path / kind))
        try:
            return session.score(range(32))
        finally:
            session.close()

    want = score("f32")
    divergence = {}
    for kind in get_args(Type):
        got = score(kind)
        assert np.isfinite(got).all(), kind
        divergence[kind] = float((np.exp(want) * (want - got)).sum(-1).mean())
    order = spearmanr([bits(kind) for kind in divergence], list(divergence.values()))
    assert order.statistic < -0.95, divergence


def test_a_plan_is_known_before_any_work(tiny):
    planned = Recipe.parse('gguf(type="q4_1", embedding="q8_0")').plan(tiny())
    assert (planned.export.format, planned.export.default, planned.export.embedding) == ("gguf", "q4_1", "q8_0")
    assert not planned.work.exists()
