from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fivefold.engines import open_session
from fivefold.engines._layers.ternary import packed_bytes, unpack
from fivefold.engines._quantize import dequantize, quantize
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.recipe import Recipe
from fivefold.techniques._shared.calibration import windows
from fivefold.techniques._shared.ternary import TernaryStudent, Through, absmean, least_squares
from fivefold.training.module import load_module
from fivefold.weights import read_tensors

NAME = "model.layers.1.mlp.down_proj"
TEXT = list(range(5, 69))


def test_the_gradient_passes_the_rounding_and_the_scales_is_exact():
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(4, 12, generator=generator).requires_grad_()
    scale = (torch.rand(4, 3, generator=generator) + 0.5).requires_grad_()
    upstream = torch.randn(4, 12, generator=generator)
    (Through.apply(u, scale) * upstream).sum().backward()
    wide = scale.detach().repeat_interleave(4, 1)
    assert torch.equal(u.grad, upstream * wide)  # as if u had not been rounded, inside the clip and outside
    free = scale.detach().clone().requires_grad_()
    codes = torch.tensor([[min(1, max(-1, round(v))) for v in row] for row in u.tolist()])
    (codes * free.repeat_interleave(4, 1) * upstream).sum().backward()
    assert torch.allclose(scale.grad, free.grad, atol=1e-6)
    assert torch.equal(Through.apply(u, scale), codes * wide)


@pytest.mark.parametrize("group", [0, 64])
def test_without_training_it_is_bitnets_rounding(tiny, group):
    parent = tiny()
    done = Recipe.parse(f'ternary(steps=0, group={group}, scale="absmean")').apply(parent)
    before, after = (dict(read_tensors(m.path)) for m in (parent, done))
    weight = before[f"{NAME}.weight"].numpy().astype(np.float64)
    cells = weight.reshape(len(weight), -1, group or weight.shape[1])
    scale = np.abs(cells).mean(2)
    want = np.clip(np.round(cells / scale[:, :, None]), -1, 1).reshape(weight.shape)
    np.testing.assert_allclose(after[f"{NAME}.scale"].numpy(), scale, rtol=1e-3)
    got = unpack(after[f"{NAME}.codes"].torch(), weight.shape[1]).numpy()
    assert (got != want).mean() < 1e-3  # only where float16 moves a weight over the edge
    assert f"{NAME}.weight" not in after
    assert "ternary: 21 of 21 linear layers, one scale per" in done.coverage[-1] and "head kept" in done.coverage[-1]
    stored = sum(after[f"{NAME}.{k}"].nbytes for k in ("codes", "scale"))
    assert stored == packed_bytes(*weight.shape, group)
    assert 1.05 * stored < weight.size * 0.3


def test_the_nearest_scale_is_nearer_than_any_other():
    weight = torch.randn(3, 128, generator=torch.Generator().manual_seed(3))
    found = least_squares(weight, 64)

    def error(scale):
        cells = weight.view(3, 2, 64)
        return (cells - scale[:, :, None] * (cells / scale[:, :, None]).round().clamp(-1, 1)).square().sum(-1)

    assert (error(found) < 0.85 * error(absmean(weight, 64))).all()
    tried = torch.stack([error(absmean(weight, 64) * f) for f in np.arange(0.5, 3, 0.01).tolist()]).amin(0)
    assert (error(found) < 1.02 * tried).all()


def held_out(model) -> tuple[float, float]:
    words = model.coverage[-1].split("held-out KL ")[1].split()
    return float(words[0]), float(words[4])


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_training_lowers_the_held_out_loss_and_what_it_learnt_is_served(tiny, tmp_path, activations):
    parent = tiny("qwen2")
    text = windows(parent, 1, 100)[0].tolist()
    exact = open_session(parent).score(text)
    far = {}
    for steps in (0, 40):
        recipe = Recipe.parse(f'ternary(steps={steps}, tokens=512, activations="{activations}", head="int8")')
        done = recipe.apply(parent)
        before, after = held_out(done)
        served = open_session(done)
        assert served.describe()["tensor_types"]["ternary"] == 21
        assert served.describe()["tensor_types"]["int8"] == 1  # the embedding, as the tied head
        got = served.score(text)
        far[steps] = float((np.exp(exact) * (exact - got)).sum(1).mean())
        assert len(list(served.generate(text, 8))) == 8
        assert (after == before) if steps == 0 else (after < 0.7 * before)
    assert far[40] < 0.8 * far[0]


def test_the_engine_computes_what_was_trained(tiny):
    parent = tiny()
    student = TernaryStudent(parent, load_module(parent, torch.float32), [NAME], activations=8)
    module = load_module(parent, torch.float32)
    layer = module.get_submodule(NAME)
    codes, scale = student.ternary(NAME)
    layer.weight.data = (codes * scale).float()
    layer.register_forward_pre_hook(
        lambda _, args: ((args[0] / (args[0].abs().amax(-1, keepdim=True) / 127)).round()
                         * (args[0].abs().amax(-1, keepdim=True) / 127),))
    tokens = torch.tensor([TEXT])
    with torch.no_grad():
        assert torch.allclose(student.logits(tokens), module(tokens).logits, atol=1e-4)
        assert torch.equal(student.module(tokens).logits, load_module(parent, torch.float32)(tokens).logits)
    assert torch.equal(absmean(torch.zeros(2, 64), 0) > 0, torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.parametrize("store", ["tq2_0", "tq1_0"])
def test_llama_cpp_stores_the_same_values(tiny, tmp_path, store):
    parent = tiny(width=256)
    done = Recipe.parse(f'ternary(steps=4, store="{store}")').apply(parent)
    written = dict(read_tensors(done.path))[f"{NAME}.weight"].numpy()
    assert all(len(np.unique(np.abs(row))) <= 2 for row in written)
    np.testing.assert_array_equal(dequantize(quantize(written, store), store, written.shape), written)
    (tmp_path / "file").mkdir()
    shipped = export(done, tmp_path / "file")
    session = open_session(shipped.but(run=replace(shipped.run, threads=1)))
    assert session.describe()["tensor_types"][store] == 21
    want, exact = (open_session(parent.but(path=m.path)).score(TEXT) for m in (done, parent))
    rounding, ternary = (float((np.exp(want) * (want - s)).sum(1).mean()) for s in (session.score(TEXT), exact))
    assert rounding < 0.01 * ternary  # its kernels round activations to 8 bits


def test_rows_that_do_not_fit_are_refused_or_told(tiny):
    parent = tiny()  # rows of 64 and 128
    with pytest.raises(Misfit, match="does not fit 21 of 21 linear layers: rows of 64 are not a multiple of tq2_0's"):
        Recipe.parse('ternary(store="tq2_0", rest="q8_0")').check(parent)
    mixed = tiny(width=128)  # rows of 128, and of 256 in the second matrix of the feed-forward layer
    with pytest.raises(Misfit, match=r'18 of 21 linear layers: rows of 128 .*give rest="q8_0" or choose store='):
        Recipe.parse('ternary(store="tq2_0")').check(mixed)
    done = Recipe.parse('ternary(steps=0, store="tq2_0", rest="q8_0")').apply(mixed)
    assert "3 of 21 linear layers, one scale per row, 18 written as q8_0" in done.coverage[-1]
    assert sorted(set(done.export.types.values())) == ["tq2_0"] and done.export.default == "q8_0"
    with pytest.raises(Misfit, match="rows of 64 are no multiple of 256; choose group=0"):
        Recipe.parse("ternary(group=256)").check(parent)
    with pytest.raises(Misfit, match="a scale for 256 weights"):
        Recipe.parse('ternary(group=64, store="tq2_0")').check(parent)
    with pytest.raises(Misfit, match="finds no linear layers in a model of gpt2"):
        Recipe.parse("ternary").check(tiny("gpt2"))
    with pytest.raises(Misfit, match="ternary needs float weights, which gguf"):
        Recipe.parse('ternary + gguf(type="q8_0")')
