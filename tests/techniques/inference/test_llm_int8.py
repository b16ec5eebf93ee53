from __future__ import annotations

import numpy as np
import pytest
import torch

from fivefold.engines import open_session
from fivefold.engines._layers.int8_activations import rounded
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.recipe import Recipe
from fivefold.techniques._shared.calibration import windows
from fivefold.training.module import load_module
from fivefold.weights import read_tensors


def scores(model, folder):
    session = open_session(export(model, folder))
    try:
        return session.score(range(32))
    finally:
        session.close()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_columns_with_large_inputs_keep_their_weights_and_no_others(tiny, family):
    model = tiny(family)
    module, largest = load_module(model), {}
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear) and ".layers." in name:
            part.register_forward_pre_hook(lambda _, x, name=name: largest.update({name: x[0].abs().numpy()}))
    tokens = windows(model, 1)
    with torch.no_grad():
        module(torch.tensor(tokens))
    peaks = {name: x.reshape(-1, x.shape[-1]).max(0) for name, x in largest.items()}
    assert len(peaks) == 21
    done = Recipe.parse("llm_int8(threshold=2.0, windows=1)").apply(model)
    before, after = dict(read_tensors(model.path)), dict(read_tensors(done.path))
    kept = 0
    for name, peak in peaks.items():
        columns = np.flatnonzero(peak > 2.0)
        kept += len(columns)
        weight, q = before[f"{name}.weight"].torch().float(), after[f"{name}.qweight"].numpy()
        if len(columns):
            np.testing.assert_array_equal(after[f"{name}.columns"].numpy(), columns)
            assert torch.equal(after[f"{name}.beside"].torch(), weight[:, columns].bfloat16())
            assert not q[:, columns].any()
        else:
            assert f"{name}.columns" not in after
        inside = np.delete(weight.numpy(), columns, 1)
        scale = after[f"{name}.scale"].numpy()[:, None]
        np.testing.assert_allclose(scale[:, 0], abs(inside).max(1) / 127, rtol=1e-6)
        assert (abs(np.delete(q, columns, 1) * scale - inside) <= 0.5001 * scale).all()
    of = sum(len(peak) for peak in peaks.values())
    assert 0 < kept < of
    assert done.coverage[-1] == (
        f"llm_int8: 21 of 21 linear layers, {kept} of {of} columns exceed 2 and stay in 16 bits; embedding and head"
        " kept"
    )


def test_a_threshold_nothing_exceeds_is_plain_vector_wise_rounding(tiny, tmp_path):
    model = tiny("qwen2")
    plain = scores(Recipe.parse("llm_int8(threshold=1e6, windows=1)").apply(model), tmp_path / "calibrated")
    runtime = scores(Recipe.parse('llm_int8(threshold=1e6, columns="runtime")').apply(model), tmp_path / "runtime")
    smooth = Recipe.parse("smooth_quant(alpha=0.0, spread=0.0, windows=1)").apply(model)
    np.testing.assert_array_equal(plain, runtime)
    assert abs(plain - scores(smooth, tmp_path / "smooth")).max() > 0


def test_threshold_zero_is_16_bits(tiny, tmp_path):
    model = tiny("qwen2")
    got = scores(Recipe.parse("llm_int8(threshold=0.0, windows=1)").apply(model), tmp_path / "out")
    np.testing.assert_allclose(got, with_weights(model, lambda w: w.bfloat16().float()), atol=2e-5)
    got = scores(Recipe.parse('llm_int8(threshold=0.0, columns="runtime")').apply(model), tmp_path / "runtime")
    np.testing.assert_allclose(got, with_weights(model, rounded), atol=2e-5)


def with_weights(model, change):
    module = load_module(model)
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear) and ".layers." in name:
            part.weight.data = change(part.weight.data)
    with torch.no_grad():
        return module(torch.arange(32)[None]).logits[0].log_softmax(-1).numpy()


@pytest.mark.parametrize("columns", ["calibrated", "runtime"])
def test_with_outliers_it_is_nearer_to_the_parent_than_plain_rounding(tiny, tmp_path, columns):
    from fivefold.techniques._shared.modules import rewritten, stored_tensors

    model = tiny()
    tensors = {name: tensor.torch() for name, tensor in stored_tensors(model).items()}
    for name, gain in tensors.items():
        if "layernorm" in name:
            gain[3] = 300.0
            for reader in ("q_proj", "k_proj", "v_proj") if "input" in name else ("gate_proj", "up_proj"):
                block = "self_attn" if "input" in name else "mlp"
                tensors[f"{name.rsplit('.', 2)[0]}.{block}.{reader}.weight"][:, 3] /= 300.0
    model = rewritten(model, "spiked", tensors)
    want = scores(model, tmp_path / "parent")
    errors = []
    for threshold in (20.0, 1e6):
        done = Recipe.parse(f'llm_int8(threshold={threshold}, columns="{columns}")').apply(model)
        errors.append(abs(scores(done, tmp_path / str(threshold)) - want).mean())
    assert errors[0] < 0.5 * errors[1]


def test_head_in_8_bits_is_reported(tiny, tmp_path):
    model = tiny("llama", tied=False)
    done = Recipe.parse('llm_int8(head="int8", windows=1)').apply(model)
    assert done.coverage[-1].endswith("embedding and head in 8 bits")
    after = dict(read_tensors(done.path))
    assert after["lm_head.qweight"].shape == after["model.embed_tokens.qweight"].shape
    assert np.isfinite(scores(done, tmp_path / "out")).all()


def test_what_it_cannot_treat_is_refused_before_work(tiny):
    with pytest.raises(Misfit, match="no linear layers in a model of gpt2"):
        Recipe.parse("llm_int8").check(tiny("gpt2"))
    with pytest.raises(Misfit, match="float weights"):
        Recipe.parse("llm_int8 + int8")
