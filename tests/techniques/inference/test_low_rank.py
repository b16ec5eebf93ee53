from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from fivefold.engines import open_session
from fivefold.errors import Misfit, ModelError
from fivefold.recipe import Recipe
from fivefold.techniques._shared.calibration import windows
from fivefold.techniques._shared.factors import factor, rank_of
from fivefold.techniques._shared.modules import linears, matrix
from fivefold.techniques.inference.low_rank import LowRank
from fivefold.training.module import load_module
from fivefold.weights import read_tensors


def problem(rows: int, columns: int, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs whose directions differ a thousandfold in size."""
    draw = torch.Generator().manual_seed(rows)
    spread = torch.logspace(0, -3, columns, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    inputs = torch.randn(tokens, columns, generator=draw, dtype=torch.float64) * spread @ mix
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64), inputs


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_the_error_on_the_inputs_is_the_singular_values_cut_off(shape):
    """Oracle: numpy's decomposition of W times numpy's Cholesky factor; the error measured on the inputs themselves."""
    weight, inputs = problem(*shape)
    moment = inputs.T @ inputs / len(inputs)
    exact = np.linalg.svd(weight.numpy() @ np.linalg.cholesky(moment.numpy()), compute_uv=False)
    for rank in (1, 7, 20):
        down, up, values = factor(weight, moment, rank)
        assert down.shape == (rank, shape[1]) and up.shape == (shape[0], rank)
        np.testing.assert_allclose(values[:24].numpy(), exact[:24], rtol=1e-3)
        error = float((inputs @ (weight - up @ down).T).square().sum() / len(inputs))
        assert error == pytest.approx(float((exact[rank:] ** 2).sum()), rel=1e-4)
        plain_down, plain_up, _ = factor(weight, None, rank)
        assert error < float((inputs @ (weight - plain_up @ plain_down).T).square().sum() / len(inputs))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_without_inputs_it_is_the_plain_decomposition(shape):
    weight, _ = problem(*shape)
    u, s, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    down, up, values = factor(weight, None, 5)
    np.testing.assert_allclose((up @ down).numpy(), u[:, :5] * s[:5] @ vt[:5], atol=1e-10)
    np.testing.assert_allclose(values.numpy(), s, rtol=1e-10)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("tokens", [400, 3])
def test_at_full_rank_it_is_the_dense_layer_even_from_few_tokens(shape, tokens):
    weight, inputs = problem(*shape, tokens)
    down, up, _ = factor(weight, inputs.T @ inputs / tokens, min(shape))
    torch.testing.assert_close(up @ down, weight, rtol=1e-8, atol=1e-8)


def test_ranks_follow_from_the_ratio():
    assert rank_of(576, 1536, 0.0) == 418 and rank_of(192, 576, 0.5) == 72 and rank_of(2, 2, 0.95) == 1
    for rows, columns in ((576, 1536), (192, 576), (64, 64)):
        rank = rank_of(rows, columns, 0.2)
        assert rank * (rows + columns) <= 0.8 * rows * columns < (rank + 1) * (rows + columns)


def inputs_of(module, names: list[str], rows) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    handles = [module.get_submodule(n).register_forward_pre_hook(
        lambda _, args, n=n: seen.__setitem__(n, args[0].reshape(-1, args[0].shape[-1]).double())) for n in names]
    with torch.no_grad():
        module(torch.tensor(rows))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_each_layer_gets_the_best_factors_for_what_its_treated_predecessors_give(tiny, family):
    model = tiny(family, layers=2)
    done = Recipe.parse("low_rank(ratio=0.3, windows=2)").apply(model)
    rows = windows(model, 2)
    names = [name for name, _ in linears(load_module(model))]
    stored = dict(read_tensors(done.path))
    module = load_module(model)
    weights = {name: matrix(part).double().clone() for name, part in linears(module)}
    lost = []
    for layer in range(2):
        own = [name for name in names if f".{layer}." in name]
        seen = inputs_of(module, own, rows)
        for name in own:
            product = stored[f"{name}.up"].torch().double() @ stored[f"{name}.down"].torch().double()
            rank = rank_of(*product.shape, 0.3)
            outputs = seen[name] @ weights[name].T
            best = float((np.linalg.svd(outputs.numpy(), compute_uv=False)[rank:] ** 2).sum())
            error = float((outputs - seen[name] @ product.T).square().sum())
            assert error <= 1.01 * best + 1e-6 * float(outputs.square().sum())
            lost.append(error / float(outputs.square().sum()))
            matrix(module.get_submodule(name)).copy_(product.float())
    assert f"{np.mean(lost):.2%} of the outputs' mean square lost" in done.coverage[-1]
    tokens = list(range(5, 37))
    with torch.no_grad():
        want = module(torch.tensor([tokens])).logits[0].log_softmax(-1)
    session = open_session(done)
    np.testing.assert_allclose(session.score(tokens), want.numpy(), atol=1e-3)
    assert session.describe()["tensor_types"]["low_rank"] == len(names)
    assert len(list(session.generate(tokens, 8))) == 8


def test_bytes_fall_by_the_formula_on_disk_and_in_the_engine(tiny):
    model = tiny("llama")
    done = Recipe.parse("low_rank(ratio=0.5, windows=1)").apply(model)
    shapes = [p.shape for _, p in ((n, matrix(p)) for n, p in linears(load_module(model)))]
    saved = 4 * sum(m * n - rank_of(m, n, 0.5) * (m + n) for m, n in shapes)
    disk = [sum(t.nbytes for _, t in read_tensors(m.path)) for m in (model, done)]
    served = [open_session(m).describe()["weight_bytes"] for m in (model, done)]
    assert disk[0] - disk[1] == served[0] - served[1] == saved
    assert "21 of 21 matrices in the layers" in done.coverage[-1]
    assert done.parent.path == model.path


def test_inputs_matter(tiny):
    model = tiny("llama")
    rows = windows(model, 2)
    with torch.no_grad():
        want = load_module(model)(torch.tensor(rows)).logits.log_softmax(-1)
    damage = {}
    for weigh in ("inputs", "nothing"):
        module = load_module(model)
        LowRank(ratio=0.4, weigh=weigh).factorize(module, rows)
        with torch.no_grad():
            got = module(torch.tensor(rows)).logits.log_softmax(-1)
        damage[weigh] = float((want.exp() * (want - got)).sum(-1).mean())
    assert damage["inputs"] < 0.7 * damage["nothing"]


def test_no_file_format_or_repair_takes_factors(tiny):
    for other in ('gguf(type="q8_0")', "mixed_precision", "int8"):
        with pytest.raises(Misfit, match=r"which (low_rank|gguf|mixed|int8).* takes away; remove"):
            Recipe.parse(f"low_rank + {other}")
    with pytest.raises(Misfit, match=r"repair.* needs trainable, which low_rank takes away"):
        Recipe.parse("low_rank + repair")
    assert [t.name for t in Recipe.parse('low_rank + prune_width + dtype(type="bfloat16")')][:2] == [
        "prune_width", "low_rank"]


def test_a_damaged_folder_is_told_in_one_sentence(tiny):
    done = Recipe.parse("low_rank(windows=1)").apply(tiny("llama"))
    file = done.path / "layers.json"
    data = json.loads(file.read_text())
    data["layers"]["model.layers.0.mlp.up_proj"]["rank"] = 1
    file.write_text(json.dumps(data))
    with pytest.raises(ModelError, match=r"no usable stored layer 'model.layers.0.mlp.up_proj'; make the artifact"):
        open_session(done)


def test_the_layer_keeps_its_bias():
    from fivefold.engines._layers.low_rank import build

    old, draw = nn.Linear(6, 4), torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 6, generator=draw), torch.randn(4, 2, generator=draw)
    new = build(old, {"down": down, "up": up, "bias": old.bias.detach()}, {"rank": 2}, torch.float32)
    x = torch.randn(3, 6, generator=draw)
    torch.testing.assert_close(new(x), x @ (up @ down).T + old.bias)
