from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from fivefold.engines import open_session
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.model import Model, load
from fivefold.recipe import Recipe
from fivefold.techniques._shared.calibration import windows
from fivefold.techniques._shared.groups import importances
from fivefold.testing.tiny import TEXT, write_tokenizer
from fivefold.training.module import load_module
from fivefold.weights import read_tensors

KINDS = {"llama": LlamaConfig, "qwen2": Qwen2Config}


def grouped(folder: Path, family: str = "llama", *, heads: int = 4, kv_heads: int = 2, scale: float = 0.05, **more):
    """A tiny model with several key-value heads."""
    folder.mkdir(parents=True)
    size = write_tokenizer(folder, 320)
    config = KINDS[family](
        vocab_size=size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=0, head_dim=32, **more,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = AutoModelForCausalLM.from_config(config)
        for parameter in module.parameters():
            parameter.data += scale * torch.randn_like(parameter)
        module.save_pretrained(folder)
    (folder / "calibration.txt").write_text(TEXT * 60, encoding="utf-8")
    return load(folder).but(calibration=folder / "calibration.txt", work=folder.parent / "work")


def changed(model: Model, change) -> Model:
    """The same folder after `change(module)` on its weights."""
    module = load_module(model)
    change(module)
    module.save_pretrained(model.path)
    return model


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return load_module(model)(torch.tensor(windows(model, 2, 64))).logits


def silence(module, layer: int, channels=(), groups=()) -> None:
    """What the channels and groups write becomes exactly 0."""
    part = module.base_model.layers[layer]
    for c in channels:
        part.mlp.down_proj.weight.data[:, c] = 0
    size = part.self_attn.o_proj.in_features // module.config.num_key_value_heads
    for g in groups:
        part.self_attn.o_proj.weight.data[:, g * size : (g + 1) * size] = 0


@pytest.mark.parametrize("importance", ["taylor", "activation"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_groups_that_write_nothing_go_and_the_function_stays(tmp_path, family, importance):
    model = grouped(tmp_path / "parent", family)
    dead = [range(5, 37), range(40, 72)]
    changed(model, lambda m: [silence(m, i, dead[i], [1 - i]) for i in range(2)])
    recipe = Recipe.parse(f'prune_width(channels=0.34, groups=1, importance="{importance}", windows=2)')
    done = recipe.apply(model)
    torch.testing.assert_close(logits(done), logits(model), rtol=1e-4, atol=1e-4)
    b = done.blueprint
    assert (b.ffn, b.heads, b.kv_heads, b.head_dim) == (64, 2, 1, 32)
    assert b == recipe.plan(model).blueprint == load(done.path).blueprint
    before, after = dict(read_tensors(model.path)), dict(read_tensors(done.path))
    for layer in range(2):
        at = f"model.layers.{layer}."
        alive = [c for c in range(96) if c not in dead[layer]]
        for part in ("gate", "up"):
            name = f"{at}mlp.{part}_proj.weight"
            np.testing.assert_array_equal(after[name].numpy(), before[name].numpy()[alive])
        name = f"{at}self_attn.v_proj.weight"
        np.testing.assert_array_equal(after[name].numpy(), before[name].numpy()[32 * layer : 32 * layer + 32])
        name = f"{at}self_attn.q_proj.weight"
        np.testing.assert_array_equal(after[name].numpy(), before[name].numpy()[64 * layer : 64 * layer + 64])


def test_channels_of_gpt2_too_with_their_biases(tiny):
    model = tiny("gpt2")
    changed(model, lambda m: [layer.mlp.c_proj.weight.data[10:74].zero_() for layer in m.transformer.h])
    done = Recipe.parse("prune_width(channels=0.25, windows=2)").apply(model)
    torch.testing.assert_close(logits(done), logits(model), rtol=1e-4, atol=1e-4)
    assert done.blueprint.ffn == 192
    assert dict(read_tensors(done.path))["transformer.h.0.mlp.c_fc.bias"].shape == (192,)


def answers(module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(tokens).logits.log_softmax(-1).double()


def ranks(values) -> np.ndarray:
    return np.argsort(np.argsort(np.asarray(values)))


def test_taylor_ranks_channels_and_groups_as_removing_each_does(tmp_path):
    """Oracle: remove every one alone and take the KL from the whole model's answers."""
    model = grouped(tmp_path / "parent", heads=16, kv_heads=16)
    rows = windows(model, 8, 64)
    tokens = torch.tensor(rows)
    found = importances(load_module(model), rows, "taylor", 16)
    module = load_module(model)
    whole = answers(module, tokens)
    correlations = []
    for layer in range(2):
        for kind, (count, key) in enumerate(((96, "channels"), (16, "groups"))):
            true = []
            for one in range(count):
                part = module.base_model.layers[layer]
                writer = part.mlp.down_proj if kind == 0 else part.self_attn.o_proj
                kept = writer.weight.data.clone()
                silence(module, layer, **{key: [one]})
                true.append(float((whole.exp() * (whole - answers(module, tokens))).sum()))
                writer.weight.data = kept
            correlations.append(np.corrcoef(ranks(true), ranks(found[layer][kind]))[0, 1])
    assert min(correlations[::2]) > 0.8 and min(correlations[1::2]) > 0.6, correlations


def test_activation_is_the_mean_square_of_what_a_group_adds(tmp_path):
    model = grouped(tmp_path / "parent")
    rows = windows(model, 2, 48)
    found = importances(load_module(model), rows, "activation", 2)
    module, seen = load_module(model), {}
    for i, layer in enumerate(module.base_model.layers):
        for key, part in (("down", layer.mlp.down_proj), ("o", layer.self_attn.o_proj)):
            part.register_forward_pre_hook(lambda _, args, key=(i, key): seen.__setitem__(key, args[0][0]))
    sums = [np.zeros(96), np.zeros(2)]
    for row in rows:
        with torch.no_grad():
            module(torch.tensor(row)[None])
        part = module.base_model.layers[1]
        for c in range(96):
            sums[0][c] += float(torch.outer(seen[1, "down"][:, c], part.mlp.down_proj.weight[:, c]).square().sum())
        for g in range(2):
            at = slice(64 * g, 64 * g + 64)
            sums[1][g] += float((seen[1, "o"][:, at] @ part.self_attn.o_proj.weight[:, at].T).square().sum())
    for got, want in zip(found[1], sums, strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-4)


@pytest.mark.parametrize(("recipe", "ffn", "groups"), [("channels=0.34", 32, 0), ("channels=0.34, groups=1", 32, 1)])
def test_it_is_smaller_by_the_formula_in_every_engine(tmp_path, recipe, ffn, groups):
    model = grouped(tmp_path / "parent")
    done = Recipe.parse(f"prune_width({recipe}, windows=1)").apply(model)
    sizes = [sum(t.nbytes for _, t in read_tensors(m.path)) for m in (model, done)]
    removed = 2 * 64 * (3 * ffn + (2 + 2 * 2) * 32 * groups)
    assert sizes[0] - sizes[1] == 4 * removed == 4 * (model.blueprint.parameters - done.blueprint.parameters)
    files = [export(Recipe.parse('gguf(type="f16")').apply(m), tmp_path / f"file-{m.path.name}") for m in (model, done)]
    assert files[0].path.stat().st_size - files[1].path.stat().st_size == pytest.approx(2 * removed, abs=1024)
    tokens = list(range(5, 37))
    want = open_session(done).score(tokens)
    for engine in ("llama.cpp", "openvino"):
        session = open_session(files[1].but(run=replace(files[1].run, engine=engine)))
        np.testing.assert_allclose(session.score(tokens), want, atol=0.01)
        session.close()


def test_a_llama_whose_heads_no_longer_divide_its_width_is_still_read(tmp_path):
    model = grouped(tmp_path / "parent", heads=4, kv_heads=4)
    done = Recipe.parse("prune_width(channels=0, groups=1, windows=1)").apply(model)
    assert (done.blueprint.family, done.blueprint.heads) == ("mistral", 3)
    assert np.isfinite(open_session(done).score(list(range(5, 37)))).all()


def test_repair_and_export_follow(tmp_path):
    model = grouped(tmp_path / "parent")
    recipe = Recipe.parse('prune_width(channels=0.34, windows=1) + repair(steps=2, tokens=256) + gguf(type="q8_0")')
    done = recipe.apply(model)
    assert [t.name for t in recipe] == ["prune_width", "gguf", "repair"]
    assert done.coverage[0] == (
        "prune_width: 2 layers, feed-forward channels 96 -> 64 (63.4 rounded to a multiple of 32), key-value heads 2 ->"
        " 2; 11.5% of all parameters removed, by taylor on 128 tokens"
    )


def test_what_cannot_be_is_refused_before_work(tmp_path, tiny):
    model = grouped(tmp_path / "parent")
    for recipe, said in (
        ("prune_width(channels=0.1)", "96 channels less 10% is 96 in multiples of 32; set channels to 0.17 or more"),
        ("prune_width(groups=2)", "leaves no key-value head of 2; set groups to 1 or less"),
    ):
        with pytest.raises(Misfit, match=said):
            Recipe.parse(recipe).check(model)
    Recipe.parse("prune_width(channels=0.17)").check(model)
    with pytest.raises(Misfit, match="key-value groups of a model of gpt2; use groups=0"):
        Recipe.parse("prune_width(groups=1)").check(tiny("gpt2"))
    biased = grouped(tmp_path / "biased", heads=4, kv_heads=4, attention_bias=True)
    with pytest.raises(Misfit, match="reads a Llama with biases only when the heads divide the width"):
        Recipe.parse("prune_width(groups=1)").check(biased)
    with pytest.raises(Misfit, match="removes nothing; set channels"):
        Recipe.parse("prune_width(channels=0)").check(model)
