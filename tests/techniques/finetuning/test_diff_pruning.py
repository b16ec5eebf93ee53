"""Diff pruning: gates that close, the cut to the target share, training of what is left, what is handed on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from masked import (
    assert_same,
    assert_sparse_gives_it_back,
    differing,
    module,
    planned,
    pupil,
    resumed,
    stream,
    tensors,
    trained,
)

from fivefold.errors import Misfit
from fivefold.recipe import make
from fivefold.training.loop import Hooks, fit
from fivefold.training.method import Lesson, Methods
from fivefold.training.module import loss_of
from fivefold.training.run import _groups, _micro, prepared

RECIPE = "diff_pruning(share=0.05, rate=0.003)"


def lesson(model, recipe: str = RECIPE) -> tuple[Lesson, object]:
    model = planned(model, recipe)
    methods = Methods.of(model.train)
    return prepared(model, methods.adaptation, methods), methods.adaptation


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_target_share_differs_and_the_file_gives_it_back(tmp_path: Path, family: str, dtype: str) -> None:
    model = pupil(tmp_path, family, dtype=dtype)
    done = trained(model, RECIPE, tmp_path / "run")
    given, _ = lesson(model)
    k = round(0.05 * sum(part.weight.numel() for part in given.extra["parts"].values()))
    sparse = assert_sparse_gives_it_back(model, done)
    changed = differing(model, done.model)
    assert done.numbers == k == sparse.count == sum(int(w.sum()) for w in changed.values())
    assert done.fitted.after < done.fitted.before
    assert all(name.endswith(("proj.weight", "c_attn.weight", "c_fc.weight")) for name in changed)
    assert f"{k:,} numbers trained" in done.model.coverage[-1]


def test_it_begins_as_the_parent_and_ends_as_what_is_handed_on(tmp_path: Path) -> None:
    model = pupil(tmp_path)
    done = trained(model, RECIPE, tmp_path / "run")
    batches = stream(model).batches()
    given, _ = lesson(model)
    given.module.eval()
    start = loss_of(given.module)(batches[0])
    torch.testing.assert_close(start, loss_of(module(model).eval())(batches[0]))
    ends = tensors(done.model)
    for name, part in given.extra["parts"].items():
        part.change.data.copy_(ends[f"{name}.weight"] - tensors(model)[f"{name}.weight"])
    given.extra["draws"].fixed.fill_(1)
    torch.testing.assert_close(loss_of(given.module)(batches[0]), loss_of(module(done.model).eval())(batches[0]))


def test_gates_close_at_a_price_and_stay_open_for_nothing(tmp_path: Path) -> None:
    shares = {}
    for strength in (0.0, 10.0, 1000.0):
        model = pupil(tmp_path / str(strength), steps=40)
        given, technique = lesson(model, f"diff_pruning(rate=0.003, gate_rate=0.5, strength={strength})")
        data, asked = stream(model), iter([1.0, 0.0])
        hooks = Hooks(penalty=lambda step, t=technique, g=given: t.penalty(g, step),
                      stepped=lambda step, t=technique, g=given: t.stepped(g, step))
        fit(given.plan, _groups(given, technique.rates(given)), loss_of(given.module),
            lambda step, d=data: _micro(d.step(step)), lambda a=asked: next(a), hooks=hooks, checks=1,
            optimizer=technique.default_optimizer())
        gates = torch.cat([p.openness.detach().flatten() for p in given.extra["parts"].values()])
        shares[strength] = float((gates > 0).float().mean())
        assert int(given.extra["draws"].step) == 40, "a draw of its own for each step"
    assert shares[0.0] > 0.9 and shares[1000.0] < 0.05
    assert shares[1000.0] <= shares[10.0] < shares[0.0]


def test_the_penalty_is_the_price_times_the_expected_open_share(tmp_path: Path) -> None:
    given, technique = lesson(pupil(tmp_path))
    draw = torch.Generator().manual_seed(0)
    parts = given.extra["parts"].values()
    for part in parts:
        part.openness.data.copy_(torch.randn(part.openness.shape, generator=draw))
    openness = torch.cat([p.openness.detach().flatten() for p in parts])
    penalty = technique.penalty(given, 1)
    assert float(penalty.detach()) == pytest.approx(10 * float(torch.sigmoid(openness).mean()), rel=1e-5)
    penalty.backward()
    some = next(iter(parts))
    p = torch.sigmoid(some.openness.detach())
    torch.testing.assert_close(some.openness.grad, 10 * p * (1 - p) / len(openness))
    given.extra["draws"].fixed.fill_(1)
    assert technique.penalty(given, 2) is None


def test_the_cut_keeps_the_largest_of_what_the_open_gates_let_through(tmp_path: Path) -> None:
    given, technique = lesson(pupil(tmp_path))
    draw, parts = torch.Generator().manual_seed(0), given.extra["parts"]
    for part in parts.values():
        part.change.data.copy_(torch.randn(part.change.shape, generator=draw))
        part.openness.data.copy_(2 * torch.randn(part.openness.shape, generator=draw))
    through = {n: p.change.detach() * (3 * torch.sigmoid(p.openness.detach()) - 1.5).clamp(0, 1)
               for n, p in parts.items()}
    every = torch.cat([v.abs().flatten() for v in through.values()])
    k = round(0.05 * len(every))
    threshold = every.sort(descending=True).values[k - 1]
    assert list(technique.anew(given, lambda name: None)) == []
    for name, part in parts.items():
        torch.testing.assert_close(part.change.data, through[name] * (through[name].abs() >= threshold))
        assert torch.equal(given.extra["masks"][name], part.change.data != 0)


@pytest.mark.parametrize("stop", [2, 4, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_repeats_from_either_phase(tmp_path: Path, stop: int, dtype: str) -> None:
    model = pupil(tmp_path, dtype=dtype)
    whole = trained(model, RECIPE, tmp_path / "whole")
    again = resumed(model, RECIPE, tmp_path / "resumed", stop=stop)
    assert again.fitted.losses == whole.fitted.losses and again.fitted.history == whole.fitted.history
    assert_same(whole.model, again.model)


def test_when_nothing_is_gained_the_parent_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, scores = pupil(tmp_path), iter(range(1, 9))
    monkeypatch.setattr("fivefold.training.run._score", lambda *_: float(next(scores)))
    done = trained(model, RECIPE, tmp_path / "run")
    assert done.fitted.best_step == 0
    assert not differing(model, done.model) and done.numbers == 0
    assert assert_sparse_gives_it_back(model, done).count == 0


def test_layers_made_again_draw_the_same_gates(tmp_path: Path) -> None:
    model = pupil(tmp_path)
    plain = trained(model, RECIPE, tmp_path / "plain")
    again = trained(model, f"{RECIPE} + checkpoint_activations", tmp_path / "again")
    assert again.fitted.losses == pytest.approx(plain.fitted.losses, rel=1e-5)
    assert again.numbers == plain.numbers


def test_gates_learn_at_their_own_rate(tmp_path: Path) -> None:
    given, technique = lesson(pupil(tmp_path))
    rates = technique.rates(given)
    assert set(rates) == {name for name in given.trained if name.endswith("openness")}
    assert all(rate * given.plan.learning_rate == pytest.approx(0.1) for rate in rates.values())


def test_the_formulas_count_what_is_there(tmp_path: Path) -> None:
    model = pupil(tmp_path)
    given, technique = lesson(model)
    sizes = sum(math.prod(s) for s in technique.shapes(model.blueprint).values())
    assert sizes == sum(p.numel() for p in given.trained.values())
    assert all(p.dtype == torch.float32 for p in given.trained.values())
    mask = technique.weight_bytes(model.blueprint, 2) - make("full", {}).weight_bytes(model.blueprint, 2)
    assert mask == sum(m.nbytes for m in given.extra["masks"].values()) == sizes // 2


def test_one_step_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(Misfit, match="two phases and the plan has 1 step; give at least 2"):
        planned(pupil(tmp_path, steps=1), RECIPE)
