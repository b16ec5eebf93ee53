from __future__ import annotations

import numpy as np
import pytest
import torch

from fivefold.engines import open_session
from fivefold.engines._layers import load_layers
from fivefold.engines._layers.selected_ffn import SelectedFeedForward
from fivefold.errors import DataError, Misfit
from fivefold.export import export
from fivefold.recipe import Recipe
from fivefold.techniques._shared import neuron_predictor
from fivefold.techniques._shared.neuron_predictor import fit, largest, recall, sizes
from fivefold.techniques.inference.deja_vu import DejaVu
from fivefold.training.module import load_module
from fivefold.weights import read_tensors


def planted(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, and sizes of 80 neurons that four directions of the input and some noise decide."""
    generator = torch.Generator().manual_seed(7)
    a, b = torch.randn(4, 32, generator=generator), torch.randn(80, 4, generator=generator)
    fresh = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 32, generator=fresh)
    return x, (x @ a.T @ b.T + 9 + torch.randn(tokens, 80, generator=fresh)).clamp_min(0)


def chosen(scores: torch.Tensor, share: float) -> torch.Tensor:
    return scores > scores.flatten().kthvalue(int((1 - share) * scores.numel())).values


def test_the_fit_is_the_best_predictor_of_its_rank(monkeypatch):
    """Against alternating least squares for min |Y - X A^T B^T|^2, started from several places."""
    monkeypatch.setattr(neuron_predictor, "RIDGE", 1e-9)
    x, targets = planted(600)
    x = x @ torch.randn(32, 32, generator=torch.Generator().manual_seed(3))
    y = targets.double() - targets.double().mean(0)
    found = fit(x, targets, 3)
    error = float((x.double() @ found.reduce.double().T @ found.expand.double().T - y).square().sum())
    best = np.inf
    for seed in range(3):
        b = torch.randn(80, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for _ in range(300):
            a = torch.linalg.lstsq(x.double(), y @ torch.linalg.pinv(b).T).solution.T
            b = torch.linalg.lstsq(x.double() @ a.T, y).solution.T
        best = min(best, float((x.double() @ a.T @ b.T - y).square().sum()))
    assert error == pytest.approx(best, rel=1e-3)
    assert torch.equal(found.offset, targets.mean(0))


def test_a_predictor_of_the_planted_rank_finds_what_it_never_saw():
    x, size = planted(500, seed=1)
    wanted = largest(size, 0.3)
    of_four, of_one = (recall(chosen(fit(*planted(3000), rank=r).scores(x), 0.3), wanted) for r in (4, 1))
    always = recall(chosen(fit(*planted(3000), rank=1).offset.expand(500, -1) + 1e-5 * size, 0.3), wanted)
    random = recall(torch.rand(wanted.shape, generator=torch.Generator().manual_seed(2)) < 0.3, wanted)
    assert random == pytest.approx(0.3, abs=0.02)
    assert of_four > 0.75 > of_one > max(random, always) + 0.05


def test_important_neurons_are_those_that_add_most():
    hidden, down = torch.randn(5, 7), torch.randn(3, 7)
    mask = largest(sizes(hidden, down), 3 / 7)
    for row, got in zip(hidden, mask, strict=True):
        by_hand = [float((row[i] * down[:, i]).norm()) for i in range(7)]
        assert {i for i in range(7) if got[i]} == set(sorted(range(7), key=by_hand.__getitem__)[-3:])


def test_the_engine_computes_the_parent_with_the_predicted_neurons(tiny, tmp_path):
    model, ids = tiny("llama"), list(range(3, 40))
    done = Recipe.parse("deja_vu(sparsity=0.4, rank=8, windows=4)").apply(model)
    stored = load_layers(done.path, torch.float32)
    module, seen = load_module(model), {}
    for name, part in stored.named_modules():
        if isinstance(part, SelectedFeedForward):
            mlp = module.get_submodule(name)
            for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
                linear.weight.data = linear.weight.data.bfloat16().float()
            def before(_, args, name=name):
                r, e, o = (dict(read_tensors(done.path))[f"{name}.{k}"].numpy() for k in ("reduce", "expand", "offset"))
                scores = seen[name] @ r.T.astype(float) @ e.astype(float) + o
                mask = torch.tensor(scores > stored.get_submodule(name).threshold)
                mask[:, 0] |= mask.shape[1] > 4
                return (args[0] * mask,)
            mlp.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].double().numpy()}))
            mlp.down_proj.register_forward_pre_hook(before)
    with torch.no_grad():
        whole, single = module(torch.tensor([ids])).logits[0].log_softmax(-1), module(torch.tensor([ids[:1]])).logits
    (tmp_path / "out").mkdir()
    session = open_session(export(done, tmp_path / "out"))
    np.testing.assert_allclose(session.score(ids), whole, atol=2e-3)
    np.testing.assert_allclose(session._forward([ids[:1]], None, keep=1)[0][0, 0], single[0, 0], atol=2e-3)


def test_nothing_is_left_out_at_zero_and_about_the_wanted_share_otherwise(tiny, tmp_path):
    model = tiny("llama")
    for sparsity in (0.0, 0.4):
        done = DejaVu(sparsity=sparsity, rank=8, windows=4).apply(model)
        again = DejaVu(sparsity=sparsity, rank=8, windows=4).apply(model)
        assert (done.path / "model.safetensors").read_bytes() == (again.path / "model.safetensors").read_bytes()
        session = open_session(done)
        list(session.generate(list(range(20)), 30))
        parts = [m for m in session._model.modules() if isinstance(m, SelectedFeedForward)]
        dropped = 1 - sum(p.kept for p in parts) / sum(p.seen for p in parts)
        assert dropped == (0 if not sparsity else pytest.approx(sparsity, abs=0.15))


def test_what_cannot_be_is_refused(tiny):
    with pytest.raises(Misfit, match="gated feed-forwards"):
        Recipe(DejaVu()).check(tiny("gpt2"))
    with pytest.raises(Misfit, match="above the width of 64"):
        Recipe(DejaVu(rank=65)).check(tiny("llama"))
    with pytest.raises(DataError, match="too few to fit"):
        DejaVu(rank=32, windows=1).apply(tiny("llama"))
