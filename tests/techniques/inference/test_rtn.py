from __future__ import annotations

import numpy as np
import pytest
import torch

from fivefold.engines import open_session
from fivefold.engines._layers import grouped
from fivefold.errors import Misfit, RecipeError
from fivefold.export import export
from fivefold.recipe import Recipe
from fivefold.techniques._shared.grids import Grid, round_to
from fivefold.weights import read_tensors

UP = "model.layers.0.mlp.up_proj"


def brute_force(weight: np.ndarray, bits: int, group: int, symmetric: bool) -> np.ndarray:
    """Every weight at the nearest of all points of its group's grid, one at a time."""
    out = np.empty_like(weight)
    for i, start in np.ndindex(len(weight), weight.shape[1] // group):
        cells = slice(start * group, (start + 1) * group)
        one = weight[i, cells]
        if symmetric:
            extreme = one[np.abs(one).argmax()]
            points = np.float32(np.float16(-extreme / 2 ** (bits - 1))) * (np.arange(2**bits) - 2 ** (bits - 1))
        else:
            low, high = min(one.min(), 0), max(one.max(), 0)
            step = np.float32(np.float16((high - low) / (2**bits - 1)))
            zero = round(float(-low / step))
            points = step * np.arange(2**bits) + np.float32(np.float16(-zero * step))
        out[i, cells] = [min(points, key=lambda p: abs(p - w)) for w in one]
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_weight_takes_the_nearest_point_of_its_group(tiny, bits, symmetric):
    model = tiny("llama", layers=1)
    done = Recipe.parse(f"rtn(bits={bits}, group=32, symmetric={symmetric})").apply(model)
    after = dict(read_tensors(done.path))
    weight = dict(read_tensors(model.path))[f"{UP}.weight"].numpy()
    parts = {k: after[f"{UP}.{k}"].torch() for k in ("codes", "scale", "offset") if f"{UP}.{k}" in after}
    assert ("offset" in parts) == (not symmetric)
    assert parts["codes"].nbytes == weight.size * bits // 8
    got = grouped.unpack(parts, *weight.shape).numpy()
    want = brute_force(weight, bits, 32, symmetric)
    assert np.abs(np.abs(got - weight) - np.abs(want - weight)).max() < 1e-6
    grid = "symmetric" if symmetric else "with offsets"
    assert done.coverage[-1] == (
        f"rtn: 7 of 7 linear layers in {bits} bits in groups of 32, {grid}; embedding and head kept"
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [None, "importance"])
def test_a_fitted_grid_is_never_worse_and_near_the_best_of_a_fine_search(symmetric, columns):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 64, generator=generator) * (1 + 3 * (torch.rand(24, 64, generator=generator) < 0.05))
    importance = None if columns is None else torch.rand(64, generator=generator) + 0.05
    grid = Grid(bits=3, group=32, symmetric=symmetric)
    weights = (torch.ones(64) if importance is None else importance).view(1, -1, 32)

    def lost(how: str) -> torch.Tensor:
        done = round_to(weight, grid, how, importance).matrix()
        return ((done - weight).square().view(24, -1, 32) * weights).sum(2)

    cells = weight.view(24, -1, 32)
    best = torch.full((24, 2), torch.inf)
    for low in torch.linspace(0.4, 1, 31):
        for high in torch.linspace(0.4, 1, 31) if not symmetric else (low,):
            floor, top = cells.amin(2, keepdim=True) * low, cells.amax(2, keepdim=True) * high
            step = (top - floor) / 7
            if symmetric:
                floor = torch.zeros(1)
                extreme = torch.where(cells.amax(2) > -cells.amin(2), cells.amax(2), cells.amin(2))[..., None]
                step = -extreme * low / 4
            shift = 4 if symmetric else 0
            value = (((cells - floor) / step + shift).round().clamp(0, 7) - shift) * step + floor
            best = torch.minimum(best, ((value - cells).square() * weights).sum(2))
    assert (lost("fit") <= lost("range") + 1e-6).all()
    assert lost("fit").sum() < 0.9 * lost("range").sum()
    assert lost("fit").sum() < 1.01 * best.sum()


@pytest.mark.parametrize(("recipe", "kind"), [
    ('rtn(into="gguf")', "Q4_1"), ('rtn(into="gguf", symmetric=True)', "Q4_0"),
    ('rtn(into="gguf", bits=8, symmetric=True, head="int8")', "Q8_0"),
])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_gguf_file_holds_the_very_same_weights(tiny, tmp_path, family, recipe, kind):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    model = tiny(family)
    name = {"gpt2": "transformer.h.1.mlp.c_fc"}.get(family, "model.layers.1.mlp.up_proj")
    weight = dict(read_tensors(model.path))[f"{name}.weight"].torch().float()
    weight = weight.T if family == "gpt2" else weight
    bits, symmetric = (8 if kind == "Q8_0" else 4), kind != "Q4_1"
    want = round_to(weight, Grid(bits=bits, group=32, symmetric=symmetric)).matrix()
    done = export(Recipe.parse(recipe).apply(model), tmp_path / "file")
    tensors = {t.name: t for t in GGUFReader(done.path).tensors}
    up = tensors["blk.1.ffn_up.weight"]
    assert up.tensor_type.name == kind
    np.testing.assert_allclose(dequantize(up.data, up.tensor_type), want.numpy(), atol=1e-7)
    assert tensors["token_embd.weight"].tensor_type.name == ("Q8_0" if "head" in recipe else "F16")
    assert sum(t.tensor_type.name == kind for t in tensors.values()) >= 3 * (4 if family == "gpt2" else 7)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_both_engines_give_the_same_answers_from_the_same_codes(tiny, tmp_path, family):
    model = tiny(family)

    def score(recipe: str) -> np.ndarray:
        session = open_session(export(Recipe.parse(recipe).apply(model), tmp_path / str(abs(hash(recipe)))))
        try:
            return session.score(range(48))
        finally:
            session.close()

    parent, torch_, gguf = (score(r) for r in ("parent", "rtn", 'rtn(into="gguf")'))

    def kl(p: np.ndarray, q: np.ndarray) -> float:
        return float((np.exp(p) * (p - q)).sum(-1).mean())

    assert kl(torch_, gguf) < 0.1 * kl(parent, torch_)
    assert kl(parent, torch_) > 1e-5


@pytest.mark.parametrize(("recipe", "said"), [
    ("rtn(group=128)", r"6 have rows of 64, which groups of 128 do not divide; choose group=64"),
    ('rtn(bits=3, into="gguf")', r"3-bit types put scales of scales over 256 columns; set into=\"torch\""),
    ('rtn(group=64, into="gguf")', r"q4_1 has groups of 32; set group=32"),
    ('rtn(bits=8, into="gguf")', r"8-bit type has no offsets; set symmetric=True"),
])
def test_what_cannot_be_is_refused_before_any_work(tiny, recipe, said):
    model = tiny("llama", layers=1)
    with pytest.raises(Misfit, match=said):
        Recipe.parse(recipe).check(model)
    assert not model.work.exists()


def test_each_target_leaves_what_it_can():
    kept = Recipe.parse('rtn(into="gguf") + repair')
    assert [t.name for t in kept] == ["rtn", "repair"]
    with pytest.raises(Misfit, match="trainable"):
        Recipe.parse("rtn + repair")
    with pytest.raises(RecipeError, match="not one of"):
        Recipe.parse("rtn(bits=5)")


def test_repair_trains_the_scales_of_what_was_written(tiny):
    done = Recipe.parse('rtn(into="gguf") + repair(steps=2, tokens=256)').apply(tiny("llama"))
    assert done.coverage[-1].startswith("repair: held-out KL")
