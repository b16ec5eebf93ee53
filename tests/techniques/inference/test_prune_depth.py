from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch

from fivefold.engines import open_session
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.model import load
from fivefold.recipe import Recipe
from fivefold.techniques._shared.calibration import windows
from fivefold.techniques._shared.modules import layers
from fivefold.techniques.inference.prune_depth import shortened
from fivefold.training.module import load_module
from fivefold.weights import read_tensors


def influences(model, tokens: np.ndarray) -> list[float]:
    """From transformers' own hidden states. The last of them is after the final norm, so it is taken before."""
    module = load_module(model)
    norm = module.base_model.norm if hasattr(module.base_model, "norm") else module.base_model.ln_f
    last = []
    norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    with torch.no_grad():
        states = module(torch.tensor(tokens), output_hidden_states=True).hidden_states
    states = [*states[:-1], last[0]]
    found = []
    for before, after in itertools.pairwise(states):
        dots = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        found.append(1 - float(dots.mean()))
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_least_influential_layers_go_and_the_rest_is_renumbered(tiny, family):
    model = tiny(family, layers=5)
    done = Recipe.parse("prune_depth(layers=2, windows=2)").apply(model)
    found = influences(model, windows(model, 2))
    kept = sorted(sorted(range(5), key=lambda i: -found[i])[:3])
    dropped = [i for i in range(5) if i not in kept]
    assert done.coverage[-1] == f"prune_depth: 2 of 5 layers removed ({dropped[0]}, {dropped[1]})"
    assert done.blueprint.layers == load(done.path).blueprint.layers == 3
    before, after = dict(read_tensors(model.path)), dict(read_tensors(done.path))
    number = re.compile(r"(?<=\.)\d+(?=\.)")
    for name, tensor in after.items():
        source = number.sub(lambda m: str(kept[int(m[0])]), name)
        np.testing.assert_array_equal(tensor.numpy(), before[source].numpy())
    assert len(before) - len(after) == 2 * sum(".0." in name for name in before)
    assert done.path.joinpath("tokenizer.json").is_file()


def test_the_result_computes_what_the_kept_layers_compute(tiny):
    model = tiny("qwen2", layers=4)
    done = Recipe.parse("prune_depth(layers=1, windows=2)").apply(model)
    gone = int(re.search(r"\((\d+)\)", done.coverage[-1])[1])
    module, pruned = load_module(model), load_module(done)
    module.base_model.layers[gone].forward = lambda hidden_states, *args, **kwargs: hidden_states
    tokens = torch.tensor(windows(model, 1))
    with torch.no_grad():
        torch.testing.assert_close(pruned(tokens).logits, module(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_layer_that_adds_nothing_goes_first_and_the_function_stays(tiny, tmp_path, family):
    model = tiny(family, layers=4)
    module = load_module(model)
    layer = layers(module)[2]
    writers = (layer.self_attn.o_proj, layer.mlp.down_proj) if family == "llama" else (layer.attn.c_proj,
                                                                                      layer.mlp.c_proj)
    for parameter in (p for part in writers for p in part.parameters()):
        parameter.data.zero_()
    module.save_pretrained(model.path)
    done = Recipe.parse("prune_depth(layers=1, windows=1)").apply(model)
    assert done.coverage[-1].endswith("1 of 4 layers removed (2)")
    tokens = list(range(5, 37))
    want = open_session(model).score(tokens)
    np.testing.assert_allclose(open_session(done).score(tokens), want, atol=1e-4)
    file = export(Recipe.parse('gguf(type="f16")').apply(done), tmp_path / "file")
    np.testing.assert_allclose(open_session(file).score(tokens), want, atol=0.01)


def test_the_exported_file_is_smaller_by_its_layers(tiny, tmp_path):
    model = tiny(layers=4)
    whole = export(Recipe.parse('gguf(type="f32")').apply(model), tmp_path / "whole").path.stat().st_size
    recipe = Recipe.parse('gguf(type="f32") + prune_depth(layers=2, windows=1)')
    half = export(recipe.apply(model), tmp_path / "half").path.stat().st_size
    layer = sum(t.nbytes for name, t in read_tensors(model.path) if ".layers.0." in name)
    assert whole - half == pytest.approx(2 * layer, abs=2048)


def test_lists_of_the_config_are_cut_with_the_layers():
    config = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "eos_token_id": [1, 2], "width": 3}
    assert shortened(config, [0, 2], 3) == {**config, "num_hidden_layers": 2, "layer_types": ["a", "c"]}


def test_removing_every_layer_is_refused_before_work(tiny):
    model = tiny(layers=3)
    with pytest.raises(Misfit, match="leaves nothing of a model of 3 layers; remove at most 2"):
        Recipe.parse("prune_depth(layers=3)").check(model)


def test_the_plan_knows_the_depth_and_dense_weights_come_first(tiny):
    recipe = Recipe.parse('wanda + gguf(type="q8_0") + prune_depth(layers=1)')
    assert [t.name for t in recipe] == ["prune_depth", "wanda", "gguf"]
    assert recipe.plan(tiny(layers=3)).blueprint.layers == 2
