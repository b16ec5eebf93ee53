from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fivefold.errors import DataError
from fivefold.recipe import Recipe
from fivefold.techniques._shared.calibration import windows
from fivefold.techniques._shared.gptq import DAMP, solve
from fivefold.techniques._shared.grids import Codes, Grid, round_to
from fivefold.techniques._shared.streaming import stages
from fivefold.techniques.inference.gptq import Gptq
from fivefold.training.module import load_module


def correlated(columns: int, seed: int = 0, tokens: int = 400) -> torch.Tensor:
    """mean(x x^T) of inputs that are related and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.linspace(0.2, 2, columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    return x.T @ x / tokens


def lost(done: Codes, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """D H D^T of every row, in float64, with the damping the solver minimises."""
    metric = hessian.double() + DAMP * hessian.diagonal().mean() * torch.eye(len(hessian))
    error = done.matrix().double() - weight.double()
    return ((error @ metric) * error).sum(1)


def by_the_book(weight: np.ndarray, hessian: np.ndarray, order: list[int], done: Codes) -> np.ndarray:
    """Optimal Brain Surgeon, one column after the other, the inverse updated explicitly; grids are those of `done`."""
    per = done.grid.size(weight.shape[1])
    work, codes = weight.astype(np.float64).copy(), np.zeros(weight.shape, int)
    inverse = np.linalg.inv(hessian + DAMP * hessian.diagonal().mean() * np.eye(len(hessian)))
    for j in order:
        scale = done.scale[:, j // per].numpy().astype(np.float64)
        offset = 0.0 if done.offset is None else done.offset[:, j // per].numpy().astype(np.float64)
        codes[:, j] = np.clip(np.round((work[:, j] - offset) / scale + done.grid.centre), 0, done.grid.top)
        error = work[:, j] - ((codes[:, j] - done.grid.centre) * scale + offset)
        work -= np.outer(error / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("order", ["columns", "activation"])
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(2, 32, True), (3, 64, False), (4, 0, False)])
def test_it_does_what_optimal_brain_surgeon_says(order, bits, group, symmetric):
    columns = 192
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(1))
    hessian = correlated(columns)
    done = solve(weight, hessian, Grid(bits=bits, group=group, symmetric=symmetric), order=order)
    places = list(range(columns))
    if order == "activation":
        places.sort(key=lambda j: -float(hessian[j, j]))
    want = by_the_book(weight.numpy(), hessian.double().numpy(), places, done)
    assert (done.codes.numpy() == want).mean() > 0.999


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_loses_less_than_rounding_and_each_sweep_less_again(bits, symmetric):
    weight, hessian = torch.randn(64, 128, generator=torch.Generator().manual_seed(2)), correlated(128)
    grid = Grid(bits=bits, group=32, symmetric=symmetric)
    nearest = lost(round_to(weight, grid, "fit", hessian.diagonal()), weight, hessian).sum()
    totals = [lost(solve(weight, hessian, grid, sweeps=s), weight, hessian).sum() for s in range(4)]
    assert totals[0] < 0.85 * nearest
    assert totals[1] < 0.95 * totals[0]
    assert totals[3] <= totals[2] * 1.001 <= totals[1] * 1.003


def test_on_tiny_rows_it_lies_between_rounding_and_the_best_of_all_codes():
    columns, bits = 6, 2
    weight, hessian = torch.randn(400, columns, generator=torch.Generator().manual_seed(3)), correlated(columns, 1)
    grid = Grid(bits=bits, group=0, symmetric=False)
    nearest, passed = (solve(weight, h, grid, how="range") for h in (torch.diag(hessian.diagonal()), hessian))
    assert torch.equal(nearest.scale, passed.scale)
    every = torch.tensor(list(itertools.product(range(4), repeat=columns)), dtype=torch.float64)
    metric = hessian.double() + DAMP * hessian.diagonal().mean() * torch.eye(columns)
    best = torch.empty(400, dtype=torch.float64)
    for i in range(400):
        errors = every * passed.scale[i].double() + passed.offset[i].double() - weight[i].double()
        best[i] = ((errors @ metric) * errors).sum(1).min()
    mine, plain = lost(passed, weight, hessian), lost(nearest, weight, hessian)
    assert (mine >= best - 1e-9).all()
    assert best.sum() < mine.sum() < 0.9 * plain.sum()
    assert mine.sum() - best.sum() < 0.75 * (plain.sum() - best.sum())


@pytest.mark.parametrize("order", ["columns", "activation"])
def test_with_unrelated_inputs_it_is_rounding_to_nearest(order):
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(4))
    hessian = torch.diag(torch.rand(128, generator=torch.Generator().manual_seed(5)) + 0.1)
    grid = Grid(bits=3, group=32, symmetric=False)
    done, want = solve(weight, hessian, grid, how="range", order=order), round_to(weight, grid)
    assert torch.equal(done.codes, want.codes)
    assert torch.equal(done.scale, want.scale)


def test_inputs_that_never_come_do_not_stop_it():
    weight, hessian = torch.randn(8, 64), correlated(64)
    hessian[5], hessian[:, 5] = 0, 0
    grid = Grid(bits=4, group=32, symmetric=False)
    for one in (hessian, torch.zeros(64, 64)):
        done = solve(weight, one, grid, sweeps=2).matrix()
        assert torch.isfinite(done).all()
        assert (done - weight).abs().max() < 4
    assert not solve(torch.zeros(8, 64), hessian, grid, sweeps=2).matrix().any()


def _alone(module, name, tokens, turned):
    """One layer solved from the inputs that `module` gives it."""
    kept: list[torch.Tensor] = []
    handle = module.get_submodule(name).register_forward_pre_hook(lambda _, a: kept.append(a[0].flatten(0, 1)))
    with torch.no_grad():
        module(torch.tensor(tokens))
    handle.remove()
    weight = module.get_submodule(name).weight.data
    hessian = kept[0].T @ kept[0] / len(kept[0])
    return solve(weight.T if turned else weight, hessian, Grid(bits=3, group=32, symmetric=False), sweeps=2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_each_layer_sees_the_inputs_its_rounded_predecessors_give(tiny, family):
    model = tiny(family, layers=2)
    tokens = windows(model, 3)
    names = {"gpt2": ("transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_proj")}.get(
        family, ("model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"))
    module = load_module(model, torch.float32)
    rounded = dict(Gptq(bits=3, windows=3).solve(module, tokens))
    assert len(rounded) == (8 if family == "gpt2" else 14)
    fresh = load_module(model, torch.float32)
    order = list(rounded)
    for name in names:
        for done in order[: order.index(name)]:
            fresh.get_submodule(done).weight.data.copy_(module.get_submodule(done).weight.data)
        same, stale = (
            (rounded[name].codes == _alone(one, name, tokens, family == "gpt2").codes).float().mean()
            for one in (fresh, load_module(model, torch.float32)))
        assert same > 0.97 and same > stale + 0.05


def test_streaming_gives_what_one_pass_over_all_windows_gives(tiny):
    model = tiny("qwen2")
    tokens = windows(model, 4)
    module = load_module(model, torch.float32)
    with torch.no_grad():
        want = module(torch.tensor(tokens), output_hidden_states=True).hidden_states
    for stage in stages(module, tokens):
        got = torch.cat(stage.hidden)
        torch.testing.assert_close(got, want[stage.number], rtol=1e-4, atol=1e-4)
        parts = {"up": stage.layer.mlp.up_proj, "gate": stage.layer.mlp.gate_proj, "o": stage.layer.self_attn.o_proj}
        assert stage.shared(parts) == [["o"], ["gate", "up"]]


def test_too_short_a_text_is_refused(tiny):
    model = tiny("llama", layers=1)
    with pytest.raises(DataError, match="windows"):
        Recipe.parse("gptq(windows=4096)").apply(model)


@pytest.mark.parametrize("into", ["torch", "gguf"])
def test_less_is_lost_than_by_rounding_in_the_engine_that_serves_it(tiny, tmp_path, into):
    from fivefold.engines import open_session
    from fivefold.export import export

    model = tiny("llama")
    text = windows(model, 3)[1].tolist()

    def score(recipe: str) -> np.ndarray:
        session = open_session(export(Recipe.parse(recipe).apply(model), tmp_path / str(abs(hash(recipe)))))
        try:
            return session.score(text)
        finally:
            session.close()

    parent, nearest, solved = (score(r) for r in ("parent", f'rtn(into="{into}")', f'gptq(into="{into}", windows=16)'))
    kl = [float((np.exp(parent) * (parent - got)).sum(-1).mean()) for got in (nearest, solved)]
    assert kl[1] < 0.8 * kl[0]
