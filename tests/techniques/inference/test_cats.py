from __future__ import annotations

import numpy as np
import pytest
import torch

from fivefold.engines import open_session
from fivefold.engines._layers import read_manifest
from fivefold.engines._layers.selected_ffn import SelectedFeedForward
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.model import Model
from fivefold.recipe import Recipe
from fivefold.techniques._shared.calibration import windows
from fivefold.techniques.inference.cats import Cats
from fivefold.training.module import load_module


def kept(gate: torch.Tensor, cut: float) -> torch.Tensor:
    """The first of many tokens keeps all."""
    return (gate.abs() > cut) | ((torch.arange(gate.shape[1]) == 0) & (gate.shape[1] > 4))[:, None]


def by_hand(model: Model, tokens: list[list[int]], cuts: dict[str, float]) -> torch.Tensor:
    module = load_module(model)
    for name, cut in cuts.items():
        mlp = module.get_submodule(name)
        for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            part.weight.data = part.weight.data.bfloat16().float()
        mlp.act_fn.register_forward_hook(lambda _, args, out, cut=cut: out * kept(out, cut))
    with torch.no_grad():
        return module(torch.tensor(tokens)).logits


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_the_engine_computes_the_parent_with_small_gates_zeroed(tiny, tmp_path, family, sparsity):
    model, ids = tiny(family), list(range(3, 40))
    done = Recipe.parse(f"cats(sparsity={sparsity}, windows=2)").apply(model)
    cuts = {name: layer["threshold"] for name, layer in read_manifest(done.path).items()}
    assert len(cuts) == 3 and (sparsity > 0) == all(cuts.values())
    (tmp_path / "out").mkdir()
    session = open_session(export(done, tmp_path / "out"))
    np.testing.assert_allclose(session.score(ids), by_hand(model, [ids], cuts)[0].log_softmax(-1), atol=2e-3)
    step = [session._forward([[token]], None, keep=1)[0][0, 0] for token in ids[:4]]
    np.testing.assert_allclose(step, by_hand(model, [[i] for i in ids[:4]], cuts)[:, 0], atol=2e-3)
    parts = [m for m in session._model.modules() if isinstance(m, SelectedFeedForward)]
    assert 1 - sum(p.kept for p in parts) / sum(p.seen for p in parts) == pytest.approx(sparsity, abs=0.15)


def test_thresholds_are_quantiles_of_the_gates_treated_predecessors_give(tiny):
    model = tiny("llama", layers=2)
    tokens = windows(model, 2)
    done = Cats(sparsity=0.6, windows=2).apply(model)
    cuts = {name: layer["threshold"] for name, layer in read_manifest(done.path).items()}
    module, sizes = load_module(model), {}
    for name, cut in cuts.items():
        def after(_, args, out, name=name, cut=cut):
            sizes[name] = out.abs().flatten().sort().values
            return out * kept(out, cut)
        module.get_submodule(name).act_fn.register_forward_hook(after)
    with torch.no_grad():
        module(torch.tensor(tokens))
    for name, ordered in sizes.items():
        assert cuts[name] == pytest.approx(float(ordered[int(0.6 * len(ordered)) - 1]), rel=1e-5)


def test_families_without_a_gate_are_refused_and_coverage_is_told(tiny):
    with pytest.raises(Misfit, match="gated feed-forwards"):
        Recipe(Cats()).check(tiny("gpt2"))
    done = Cats(windows=1).apply(tiny("llama"))
    assert done.coverage[-1] == (
        "cats: 3 of 3 feed-forwards leave out 0.5 of their neurons; attention, embedding and head dense"
    )
    with pytest.raises(Misfit):
        Recipe.parse("cats + teal")
