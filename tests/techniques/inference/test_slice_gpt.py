from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fivefold.engines import open_session
from fivefold.errors import Misfit, ModelError
from fivefold.export import export
from fivefold.model import load, read_config
from fivefold.recipe import Recipe
from fivefold.techniques._shared.calibration import windows
from fivefold.techniques._shared.residual import axes
from fivefold.testing.tiny import tiny_model
from fivefold.training.module import load_module
from fivefold.weights import dump_json, read_tensors


def logits(model, rows) -> torch.Tensor:
    with torch.no_grad():
        return load_module(model)(torch.tensor(rows)).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_slice_0_turns_every_matrix_and_changes_nothing(tiny, family, tied):
    model = tiny(family, tied=tied)
    recipe = Recipe.parse("slice_gpt(slice=0.0, windows=2)")
    done = recipe.apply(model)
    rows = windows(model, 2, 64)
    torch.testing.assert_close(logits(done, rows), logits(model, rows), rtol=1e-4, atol=1e-4)
    before, after = dict(read_tensors(model.path)), dict(read_tensors(done.path))
    assert all(not np.allclose(after[n].numpy(), before[n].numpy(), atol=1e-3)
               for n in before if len(before[n].shape) == 2)
    assert all((t.numpy() == 1).all() for n, t in after.items() if n.endswith("norm.weight"))
    assert not done.blueprint.tied and done.blueprint == recipe.plan(model).blueprint == load(done.path).blueprint


def by_the_paper(model, basis: np.ndarray, ids) -> np.ndarray:
    """SliceGPT's own network on a one-token text, in float64 numpy: norms of the old width, no attention to speak of.

    With one token the softmax is 1, so attention is its value; the rotary angle of position 0 is 0.
    """
    w = {n: t.numpy().astype(np.float64) for n, t in read_tensors(model.path)}
    width, eps = model.blueprint.width, 0.05
    repeat = model.blueprint.heads // model.blueprint.kv_heads

    def norm(z):
        return z / np.sqrt((z * z).sum() / width + eps)

    out = []
    for token in ids:
        z = w["model.embed_tokens.weight"][token] @ basis
        for i in range(model.blueprint.layers):
            at = f"model.layers.{i}."
            first, second = w[f"{at}input_layernorm.weight"], w[f"{at}post_attention_layernorm.weight"]
            read = {p: w[f"{at}{p}_proj.weight"] @ np.diag(first if "attn" in p else second) @ basis
                    for p in ("self_attn.v", "mlp.gate", "mlp.up")}
            value = (read["self_attn.v"] @ norm(z)).reshape(model.blueprint.kv_heads, -1)
            z = z + basis.T @ w[f"{at}self_attn.o_proj.weight"] @ value.repeat(repeat, 0).reshape(-1)
            gate, up = read["mlp.gate"] @ norm(z), read["mlp.up"] @ norm(z)
            z = z + basis.T @ w[f"{at}mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
        out.append(w["model.embed_tokens.weight"] @ np.diag(w["model.norm.weight"]) @ basis @ norm(z))
    return np.array(out)


def test_the_slice_computes_what_the_papers_network_does(tiny):
    model = tiny("llama")
    dump_json(model.path / "config.json", {**read_config(model.path), "rms_norm_eps": 0.05})
    basis, _ = axes(load_module(model), windows(model, 2))
    done = Recipe.parse("slice_gpt(slice=0.5, windows=2)").apply(model)
    ids = np.array([[3], [70], [200]])
    got = logits(done, ids)[:, 0].numpy()
    want = by_the_paper(model, basis[:, :32].numpy(), ids[:, 0])
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_the_axes_are_the_principal_components_of_every_norms_input(tiny):
    """Oracle: the right singular vectors of all inputs stacked, each of length sqrt(width)."""
    model = tiny("qwen2")
    rows = windows(model, 2, 48)
    module, seen = load_module(model), []
    parts = [p for n, p in module.named_modules() if n.endswith("norm")]
    assert len(parts) == 2 * 3 + 1
    for part in parts:
        part.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 64).double()))
    with torch.no_grad():
        module(torch.tensor(rows))
    stacked = torch.cat(seen)
    stacked = stacked / stacked.norm(dim=1, keepdim=True)
    basis, shares = axes(load_module(model), rows)
    _, s, vt = np.linalg.svd(stacked.numpy(), full_matrices=False)
    np.testing.assert_allclose(shares.numpy(), s**2 / (s**2).sum(), rtol=1e-4, atol=1e-8)
    overlap = np.abs(vt[:8] @ basis[:, :8].numpy())
    np.testing.assert_allclose(overlap, np.eye(8), atol=1e-3)


def test_the_strongest_axes_lose_less_than_the_weakest(tiny, monkeypatch):
    model = tiny("llama", tied=False)
    rows = windows(model, 2, 64)
    want = logits(model, rows).log_softmax(-1)
    recipe = Recipe.parse("slice_gpt(slice=0.5, windows=2)")

    def damage() -> float:
        got = logits(recipe.apply(model), rows).log_softmax(-1)
        return float((want.exp() * (want - got)).sum(-1).mean())

    best = damage()
    basis, shares = axes(load_module(model), windows(model, 2))
    monkeypatch.setattr("fivefold.techniques._shared.residual.axes", lambda *_: (basis.flip(1), shares.flip(0)))
    assert best < 0.7 * damage()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_engine_reads_the_narrow_model_and_its_bytes_fall_by_the_formula(tmp_path, family):
    model = tiny_model(tmp_path / "parent", family, tied=False, context=128)
    recipe = Recipe.parse("slice_gpt(slice=0.5, windows=1)")
    done = recipe.apply(model)
    sizes = [sum(t.nbytes for _, t in read_tensors(m.path)) for m in (model, done)]
    biases, new = (3 * 4 * 128, 3 * 4 * 32) if family == "qwen2" else (0, 0)
    assert sizes[1] == (sizes[0] - biases) / 2 + biases + new
    assert done.blueprint.parameters * 2 == model.blueprint.parameters and done.blueprint.family == "llama"
    assert done.coverage[-1].endswith("50.0% of all parameters removed")
    exported = export(Recipe.parse('gguf(type="f16")').apply(done), tmp_path / "half")
    tokens = list(range(5, 37))
    want = open_session(done).score(tokens)
    for engine in ("llama.cpp", "openvino")[: 1 if family == "qwen2" else 2]:
        session = open_session(exported.but(run=replace(exported.run, engine=engine)))
        np.testing.assert_allclose(session.score(tokens), want, atol=0.02)
        session.close()
    if family == "qwen2":
        with pytest.raises(ModelError, match="openvino reads a llama with attention biases wrongly"):
            open_session(exported.but(run=replace(exported.run, engine="openvino")))


def test_a_width_the_heads_do_not_divide_is_served_too(tiny):
    model = tiny("llama", width=192)
    done = Recipe.parse("slice_gpt(slice=0.5, windows=1) + prune_width(channels=0.5, windows=1)").apply(model)
    assert (done.blueprint.width, done.blueprint.ffn, done.blueprint.head_dim) == (96, 192, 96)
    assert np.isfinite(open_session(done).score(list(range(5, 37)))).all()


def test_what_cannot_be_is_refused_before_work(tiny):
    with pytest.raises(Misfit, match="gpt2 is not one of llama, mistral, qwen2, qwen3; use prune_width"):
        Recipe.parse("slice_gpt").check(tiny("gpt2"))
    with pytest.raises(Misfit, match=r"a width of 64 less 20% is 64 in multiples of 32; set slice to 0\.26 or"):
        Recipe.parse("slice_gpt(slice=0.2)").check(tiny("llama"))
    Recipe.parse("slice_gpt(slice=0.26)").check(tiny("llama"))
