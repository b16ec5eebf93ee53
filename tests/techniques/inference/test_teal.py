from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fivefold.engines import open_session
from fivefold.engines._layers import read_manifest
from fivefold.engines._layers.thresholded import ThresholdedLinear
from fivefold.engines._layers.thresholded_ffn import ThresholdedFeedForward
from fivefold.errors import DataError, Misfit, ModelError, RecipeError
from fivefold.export import export
from fivefold.model import Model
from fivefold.recipe import Recipe
from fivefold.techniques._shared.calibration import windows
from fivefold.techniques._shared.modules import linears
from fivefold.techniques._shared.sparsity_allocation import greedy
from fivefold.techniques.inference.teal import Teal
from fivefold.training.module import load_module

FAMILIES = ("llama", "qwen2", "gpt2")
OTHER = "Nobody had asked the dog whether 17 joules were enough, and she sells 9 shells in a day.\n" * 8


def served(model: Model, folder) -> Model:
    folder.mkdir()
    return export(model, folder)


def kept(x: torch.Tensor, cut: float) -> torch.Tensor:
    mask = x.abs() > cut
    if x.shape[1] > 4:
        mask[:, 0] = True
    return mask


def by_hand(model: Model, tokens: np.ndarray, cuts: dict[str, float]) -> torch.Tensor:
    """Logits of the parent's own modules, every linear layer reading its cut inputs."""
    module = load_module(model)
    for name, part in linears(module):
        part.weight.data = part.weight.data.bfloat16().float()
        part.register_forward_pre_hook(lambda _, args, cut=cuts[name]: (args[0] * kept(args[0], cut),))
    with torch.no_grad():
        return module(torch.tensor(tokens)).logits


def cuts_of(model: Model) -> dict[str, float]:
    found = {}
    for name, layer in read_manifest(model.path).items():
        if layer["kind"] == "thresholded":
            found[name] = layer["threshold"]
        else:
            found |= {f"{name}.gate_proj": layer["threshold"], f"{name}.up_proj": layer["threshold"],
                      f"{name}.down_proj": layer["threshold_down"]}
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_computes_the_parent_with_its_small_inputs_zeroed(tiny, tmp_path, family):
    model = tiny(family)
    done = Recipe.parse("teal(sparsity=0.4, windows=2)").apply(model)
    cuts, ids = cuts_of(done), list(range(3, 40))
    session = open_session(served(done, tmp_path / "out"))
    want = by_hand(model, np.array([ids]), cuts)[0].log_softmax(-1)
    np.testing.assert_allclose(session.score(ids), want, atol=2e-3)
    step = [session._forward([[token]], None, keep=1)[0][0, 0] for token in ids[:4]]
    want = by_hand(model, np.array([[i] for i in ids[:4]]), cuts)[:, 0]
    np.testing.assert_allclose(step, want, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sparsity_of_zero_is_the_parent(tiny, tmp_path, family):
    model = tiny(family)
    session = open_session(served(Teal(sparsity=0.0, windows=1).apply(model), tmp_path / "out"))
    want = by_hand(model, np.array([range(40)]), dict.fromkeys(dict(linears(load_module(model))), 0.0))
    np.testing.assert_allclose(session.score(range(40)), want[0].log_softmax(-1), atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_about_the_wanted_share_is_dropped_on_other_text(tiny, tmp_path, sparsity):
    from fivefold.tokenizer import Tokenizer

    model = tiny("llama")
    done = Teal(sparsity=sparsity, windows=4, allocation="uniform").apply(model)
    session = open_session(served(done, tmp_path / "out"))
    cache = None
    for token in Tokenizer(model.tokenizer_file).encode(OTHER)[:120]:
        _, cache = session._forward([[token]], cache, keep=1)
    kept, seen = 0, 0
    for part in session._model.modules():
        if isinstance(part, ThresholdedLinear):
            kept, seen = kept + part.kept, seen + part.seen
        elif isinstance(part, ThresholdedFeedForward):
            kept, seen = kept + sum(part.kept), seen + part.seen * (part.width + part.ffn)
    assert 1 - kept / seen == pytest.approx(sparsity, abs=0.06)


def test_thresholds_are_quantiles_of_what_treated_predecessors_give(tiny):
    model = tiny("llama", layers=2)
    tokens = windows(model, 2)
    found = Teal(sparsity=0.3, allocation="uniform").thresholds(load_module(model), tokens)
    module, seen = load_module(model), {}
    for name, part in linears(module):
        def before(_, args, name=name):
            seen[name] = args[0].abs().flatten().sort().values
            return (args[0] * kept(args[0], found[name]),)
        part.register_forward_pre_hook(before)
    with torch.no_grad():
        module(torch.tensor(tokens))
    assert found.keys() == seen.keys()
    for name, sizes in seen.items():
        assert found[name] == pytest.approx(float(sizes[int(0.3 * len(sizes)) - 1]), rel=1e-5)
    assert found["model.layers.0.self_attn.q_proj"] == found["model.layers.0.self_attn.v_proj"]


def test_greedy_finds_the_best_division_of_errors_that_add_up():
    weights, sizes = {"a": 1.0, "b": 5.0, "c": 0.4}, {"a": 300, "b": 200, "c": 100}

    def error(shares):
        return sum(weights[k] * sizes[k] * shares[k] ** 2.5 for k in sizes)

    found = greedy(error, sizes, 0.5)
    grid = [i * 0.05 for i in range(20)]
    fine = [
        {"a": a, "b": b, "c": c} for a in grid for b in grid
        if 0 <= (c := (300 - 300 * a - 200 * b) / 100) <= 0.95
    ]
    assert sum(sizes[k] * found[k] for k in sizes) == pytest.approx(300)
    assert error(found) <= min(map(error, fine)) * 1.03
    assert error(found) < 0.8 * error(dict.fromkeys(sizes, 0.5))
    assert greedy(error, sizes, 0.0) == {"a": 0, "b": 0, "c": 0}


def test_greedy_skips_the_wanted_weights_and_changes_layers_less(tiny):
    model = tiny("llama", layers=2)
    tokens, found = windows(model, 2), {}
    for allocation in ("uniform", "greedy"):
        cuts = Teal(sparsity=0.4, allocation=allocation).thresholds(load_module(model), tokens)
        module, skipped = load_module(model), []
        for name, part in linears(module):
            def before(part, args, cut=cuts[name], skipped=skipped):
                skipped.append((float((args[0].abs() <= cut).float().mean()), part.weight.numel()))
                return (args[0] * kept(args[0], cut),)
            part.register_forward_pre_hook(before)
        with torch.no_grad():
            args, kwargs = first(model, tokens)
            want = load_module(model).base_model.layers[0](*args, **kwargs)
            error = float((module.base_model.layers[0](*args, **kwargs) - want).square().mean())
        share = sum(a * b for a, b in skipped) / sum(b for _, b in skipped)
        assert share == pytest.approx(0.4, abs=0.02)
        found[allocation] = error
    assert found["greedy"] < found["uniform"]


def first(model, tokens):
    """The arguments of the first layer."""
    module, seen = load_module(model), []
    handle = module.base_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        module(torch.tensor(tokens))
    handle.remove()
    return seen[0]


def test_it_is_deterministic_and_says_what_it_covered(tiny):
    model = tiny("llama")
    one, two = (Teal(sparsity=0.5, windows=1).apply(model) for _ in range(2))
    assert (one.path / "model.safetensors").read_bytes() == (two.path / "model.safetensors").read_bytes()
    assert (one.path / "layers.json").read_bytes() == (two.path / "layers.json").read_bytes()
    assert one.coverage[-1].startswith("teal: 21 of 21 linear layers drop inputs, 0.5 of a layer's weights are skipped")


def test_what_cannot_be_is_refused(tiny, tmp_path, monkeypatch):
    model = tiny("llama")
    for sparsity in (-0.1, 1.0):
        with pytest.raises(RecipeError, match="outside"):
            Teal(sparsity=sparsity)
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(DataError, match="longer text"):
        Teal().apply(model.but(calibration=short))
    with pytest.raises(Misfit):
        Recipe.parse("teal + int8")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Misfit, match="no-such-compiler"):
        Recipe(Teal()).check(model)


def test_a_damaged_layer_is_told_in_one_sentence(tiny, tmp_path):
    done = Teal(sparsity=0.5, windows=1).apply(tiny("llama"))
    file = done.path / "layers.json"
    file.write_text(file.read_text().replace('"threshold_down":', '"threshold_up":'))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp"):
        open_session(done.but(run=replace(done.run)))
