from __future__ import annotations

import numpy as np
import pytest
import torch

from fivefold.engines import open_session
from fivefold.engines._layers.int8_activations import rounded, unpack
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.recipe import Recipe
from fivefold.techniques._shared.calibration import windows
from fivefold.techniques._shared.modules import rewritten, stored_tensors
from fivefold.techniques._shared.smoothing import Fold, gain_offset
from fivefold.techniques.inference.smooth_quant import SmoothQuant, lost
from fivefold.training.module import load_module
from fivefold.weights import read_tensors


def scores(model, folder):
    session = open_session(export(model, folder))
    try:
        return session.score(range(32))
    finally:
        session.close()


def spiked(model, gain=300.0):
    """The same function with one loud column after every norm, as in large language models."""
    tensors = {name: tensor.torch() for name, tensor in stored_tensors(model).items()}
    for name, value in tensors.items():
        if "layernorm" in name:
            value[3] *= gain
            readers = ("self_attn.q", "self_attn.k", "self_attn.v") if "input" in name else ("mlp.gate", "mlp.up")
            for reader in readers:
                tensors[f"{name.rsplit('.', 2)[0]}.{reader}_proj.weight"][:, 3] /= gain
    return rewritten(model, "spiked", tensors)


def answers(module, tokens):
    with torch.no_grad():
        return module(torch.tensor(tokens)).logits.double()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("technique", [SmoothQuant(alpha=0.0, spread=0.0), SmoothQuant(alpha=1.0, spread=0.0),
                                       SmoothQuant(), SmoothQuant(folds="norms")], ids=str)
def test_smoothing_leaves_the_function_unchanged(tiny, family, technique):
    model = spiked(tiny(family))
    module, tokens = load_module(model).float(), windows(model, 2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    want = answers(module, tokens)
    folds = technique.smooth(module, tokens, family)
    assert len(folds) == 3 * (4 if technique.folds == "all" else 2)
    assert (answers(module, tokens) - want).norm() / want.norm() < 1e-5
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert any("layernorm" in name for name in changed) and any("gate_proj" in name for name in changed)
    assert any("down_proj" in name for name in changed) == (technique.folds == "all")


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_alpha_have_closed_forms(tiny, alpha):
    """alpha 1: every column of x has the same largest value, 1; alpha 0: every column of W has."""
    model = spiked(tiny("qwen2"))
    module, tokens = load_module(model).float(), windows(model, 2)
    SmoothQuant(alpha=alpha, spread=0.0, folds="all" if alpha else "norms").smooth(module, tokens, "qwen2")
    layer = module.model.layers[1]
    groups = [[layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
              [layer.mlp.gate_proj, layer.mlp.up_proj], *([[layer.mlp.down_proj]] if alpha else [])]
    seen = {}
    for part, *_ in groups:
        part.register_forward_pre_hook(lambda m, x: seen.update({m: x[0].flatten(0, 1).abs().amax(0)}))
    answers(module, tokens)
    for group in groups:
        top = seen[group[0]] if alpha else torch.stack([part.weight.abs().amax(0) for part in group]).amax(0)
        torch.testing.assert_close(top, torch.ones_like(top), rtol=1e-3, atol=1e-3)


def fold_with_outliers(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 64, generator=generator)
    x[:, [7, 30]] *= 60
    reader = torch.nn.Linear(64, 48, bias=False)
    reader.weight.data = torch.randn(48, 64, generator=generator)
    return Fold(torch.nn.RMSNorm(64), {"reader": reader}, x, x.abs().amax(0))


def test_the_scale_is_the_papers_and_lowers_the_error_of_rounding():
    fold = fold_with_outliers()
    x, w = fold.inputs.numpy(), fold.readers["reader"].weight.data.numpy()
    want = [abs(x[:, j]).max() ** 0.7 / abs(w[:, j]).max() ** 0.3 for j in range(64)]
    np.testing.assert_allclose(fold.scale(0.7).numpy(), want, rtol=1e-5)
    exact = x @ w.T

    def error(s):
        got = rounded(torch.tensor(x / s)).numpy() @ rounded(torch.tensor(w * s)).numpy().T
        return (((got - exact) ** 2).sum(1) / (exact**2).sum(1)).sum()

    for s in (np.ones(64, np.float32), fold.scale(0.5).numpy()):
        assert lost(fold, torch.tensor(s)) == pytest.approx(error(s), rel=1e-3)
    assert error(fold.scale(0.5).numpy()) < 0.3 * error(np.ones(64, np.float32))
    alpha, best = SmoothQuant()._best(fold)
    tried = [i / 10 for i in range(11)]
    assert error(best.numpy()) <= min(error(fold.scale(a).numpy()) for a in tried) * 1.001
    assert alpha in tried


def test_no_smoothing_is_among_what_is_tried():
    fold = fold_with_outliers()
    for values in (fold.inputs, fold.readers["reader"].weight.data):  # rounding loses nothing
        values.copy_(torch.randint(-126, 127, values.shape)).clamp_(-126, 126)[:, 0] = 127
    fold.peaks = torch.linspace(1, 50, 64)
    alpha, scale = SmoothQuant()._best(fold)
    assert alpha is None and torch.equal(scale, torch.ones(64))


@pytest.mark.parametrize("recipe", ["smooth_quant(windows=2)", 'smooth_quant(spread=0.0, windows=2, head="int8")'])
def test_with_outliers_it_is_nearer_to_the_parent_than_plain_rounding(tiny, tmp_path, recipe):
    model = spiked(tiny())
    want = scores(model, tmp_path / "parent")
    plain = scores(Recipe.parse("llm_int8(threshold=1e6, windows=1)").apply(model), tmp_path / "plain")
    done = Recipe.parse(recipe).apply(model)
    assert abs(scores(done, tmp_path / "out") - want).mean() < 0.6 * abs(plain - want).mean()
    assert done.coverage[-1].startswith("smooth_quant: 21 of 21 linear layers, 2")


def test_what_is_stored_is_the_smoothed_weight_in_8_bits(tiny):
    model = spiked(tiny("qwen2"))
    done = SmoothQuant(alpha=0.6, spread=0.0, windows=2).apply(model)
    module = load_module(model).float()
    SmoothQuant(alpha=0.6, spread=0.0).smooth(module, windows(model, 2), "qwen2")
    after = {name: tensor.torch() for name, tensor in read_tensors(done.path)}
    for name, value in module.state_dict().items():
        if name.endswith("proj.weight"):
            own = {leaf: after[f"{name.removesuffix('weight')}{leaf}"] for leaf in ("qweight", "scale")}
            torch.testing.assert_close(unpack(own), rounded(value))
        elif name != "lm_head.weight":
            torch.testing.assert_close(after[name].float(), value)
    assert not list(done.work.glob("smoothed*")), "the float folder between is removed"


def test_value_heads_share_a_scale_over_their_query_heads(tiny):
    model = tiny()  # two query heads, one value head
    module = load_module(model).float()
    folds = SmoothQuant(alpha=0.5, spread=0.0).smooth(module, windows(model, 1), "llama")
    shared = [fold for fold in folds if fold.spread is not None]
    assert len(shared) == 3
    scale = shared[0].scale(0.5).view(2, 32)
    assert torch.equal(scale[0], scale[1]) and len(scale[0].unique()) > 16


def test_norms_that_add_one_to_their_gain_are_found():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    gemma = GemmaRMSNorm(32)
    gemma.weight.data = torch.randn(32)
    x, scale = torch.randn(5, 32), torch.rand(32) + 0.5
    want = gemma(x) / scale
    assert gain_offset(gemma) == 1 and gain_offset(LlamaRMSNorm(32)) == 0 and gain_offset(torch.nn.LayerNorm(32)) == 0
    Fold(gemma, {}, x, x.abs().amax(0)).apply(scale)
    torch.testing.assert_close(gemma(x), want)


def test_what_it_cannot_treat_is_refused(tiny):
    with pytest.raises(Misfit, match="no linear layers in a model of gpt2"):
        Recipe.parse("smooth_quant").check(tiny("gpt2"))
    model = tiny()
    module = load_module(model).float()
    for layer in module.model.layers:  # something else reads the norm too
        layer.self_attn.register_forward_hook(
            lambda _, args, kwargs, out: (out[0] + kwargs["hidden_states"], *out[1:]), with_kwargs=True)
    with pytest.raises(Misfit, match="more than linear layers read its norms"):
        SmoothQuant().smooth(module, windows(model, 1), "llama")
    module = load_module(model).float()
    for layer in module.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = torch.nn.Identity()
    with pytest.raises(Misfit, match="finds nothing to fold"):
        SmoothQuant(folds="norms").smooth(module, windows(model, 1), "llama")
