from __future__ import annotations

import pytest
import torch

from fivefold.errors import Misfit
from fivefold.model import load
from fivefold.recipe import Recipe
from fivefold.techniques._shared.calibration import windows
from fivefold.techniques._shared.grids import Grid, round_to
from fivefold.techniques._shared.streaming import stages
from fivefold.techniques.inference.awq import Awq
from fivefold.training.module import load_module


def outliers(model) -> None:
    """Make a few input columns of every block large, as in trained models: that is what awq is for."""
    from fivefold.techniques._shared.modules import rewritten

    module = load_module(model, torch.float32)
    tensors = {}
    for name, value in module.state_dict().items():
        if name.endswith("layernorm.weight"):
            value[::16] *= 12
        if name.endswith(("v_proj.weight", "up_proj.weight")):
            value[::16] *= 12
        tensors[name] = value.clone()
    tensors = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    return rewritten(model, "outliers", tensors)


def logits(module, tokens) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.as_tensor(tokens)).logits


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_folding_leaves_the_function_as_it_was(tiny, family):
    model = outliers(tiny(family))
    done = Recipe.parse("awq(bits=3, windows=2)").apply(model)
    tokens = windows(model, 2)
    before, after = load_module(model, torch.float32), load_module(done, torch.float32)
    want, got = logits(before, tokens), logits(after, tokens)
    assert (got - want).norm() / want.norm() < 1e-4
    changed = [n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not a.equal(b)]
    assert {n.split(".", 3)[-1] for n in changed} >= {
        "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_proj.weight",
        "self_attn.v_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
    }
    assert done.traits == model.traits
    assert done.coverage[-1].startswith("awq: 12 scalings folded into 3 of 3 layers")


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "mistral", "qwen3"])
def test_other_families_are_folded_as_their_norms_and_heads_want(tmp_path, family):
    from transformers import AutoConfig, AutoModelForCausalLM

    from fivefold.testing.tiny import TEXT, write_tokenizer

    size = write_tokenizer(tmp_path, 300)
    config = AutoConfig.for_model(
        family, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, vocab_size=size, max_position_embeddings=128, pad_token_id=0, bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    module.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT * 60)
    model = load(tmp_path).but(calibration=tmp_path / "text.txt", work=tmp_path / "work")
    done = Recipe.parse("awq(bits=3, windows=2)").apply(model)
    tokens = windows(model, 1)
    want, got = (logits(load_module(m, torch.float32), tokens) for m in (model, done))
    assert (got - want).norm() / want.norm() < 1e-4


def test_scales_are_the_best_of_the_grid_by_brute_force(tiny):
    model = outliers(tiny("llama", layers=1))
    tokens = windows(model, 4)
    module, other = load_module(model, torch.float32), load_module(model, torch.float32)
    technique, grid = Awq(bits=3, windows=4), Grid(bits=3, group=32, symmetric=False)
    (stage,) = stages(other, tokens)
    shares = list(technique.scale(stage))
    assert all(scaled < plain for plain, scaled in shares)
    down = "model.layers.0.mlp.down_proj"
    kept: list[torch.Tensor] = []
    handle = module.get_submodule(down).register_forward_pre_hook(lambda _, a: kept.append(a[0].flatten(0, 1)))
    logits(module, tokens)
    handle.remove()
    x, weight = kept[0], module.get_submodule(down).weight.data
    mean, losses = x.abs().mean(0), []
    for a in range(20):
        scale = mean ** (a / 20)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = x @ (round_to(weight * scale, grid).matrix() / scale - weight).T
        losses.append((float(error.square().sum()), weight * scale))
    best = min(losses, key=lambda pair: pair[0])
    assert best[0] < 0.9 * losses[0][0]
    torch.testing.assert_close(other.get_submodule(down).weight.data, best[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("then", ["rtn(bits=3)", 'gguf(type="q4_0", importance=False)'])
def test_what_rounds_after_it_loses_less(tiny, tmp_path, then):
    import numpy as np

    from fivefold.engines import open_session
    from fivefold.export import export

    model = outliers(tiny("llama"))
    text = windows(model, 3)[1].tolist()

    def score(recipe: str) -> np.ndarray:
        session = open_session(export(Recipe.parse(recipe).apply(model), tmp_path / str(abs(hash(recipe)))))
        try:
            return session.score(text)
        finally:
            session.close()

    assert [t.name for t in Recipe.parse(f"{then} + awq")][0] == "awq"  # noqa: RUF015
    parent, plain, scaled = (score(r) for r in ("parent", then, f"{then} + awq(bits=3, windows=4)"))
    kl = [float((np.exp(parent) * (parent - got)).sum(-1).mean()) for got in (plain, scaled)]
    assert kl[1] < 0.9 * kl[0]


def test_zeros_stay_zero(tiny):
    model = tiny("llama", layers=1)
    done = Recipe.parse("wanda(sparsity=0.5, windows=1) + awq(windows=1)").apply(model)
    weight = load_module(done).model.layers[0].mlp.down_proj.weight
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("family", "recipe", "said"), [
    ("gpt2", "awq", "leave awq out"), ("llama", "awq(group=128)", "groups of 128 do not divide rows of 64"),
])
def test_what_it_does_not_know_is_refused_before_any_work(tiny, family, recipe, said):
    model = tiny(family, layers=1)
    with pytest.raises(Misfit, match=said):
        Recipe.parse(recipe).check(model)
    assert not model.work.exists()
