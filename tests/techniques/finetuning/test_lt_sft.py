"""LT-SFT: exactly k places, those that moved most; trained again from the start; sums of differences."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from masked import (
    assert_same,
    assert_sparse_gives_it_back,
    differing,
    module,
    plain_training,
    planned,
    pupil,
    resumed,
    tensors,
    trained,
)

from fivefold.artifact import hash_folder
from fivefold.errors import Misfit
from fivefold.recipe import make
from fivefold.training.delta import Sparse, compose
from fivefold.weights import read_tensors

RECIPE = "lt_sft(share=0.02, rate=0.001)"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("held", ["split", "kahan"])
def test_exactly_k_numbers_differ_and_the_file_gives_them_back(tmp_path: Path, dtype: str, held: str) -> None:
    model = pupil(tmp_path, dtype=dtype, held=held)
    done = trained(model, RECIPE, tmp_path / "run")
    k = round(0.02 * sum(p.numel() for p in module(model).parameters()))
    sparse = assert_sparse_gives_it_back(model, done)
    differ = sum(int(where.sum()) for where in differing(model, done.model).values())
    assert done.numbers == k and done.fitted.after < done.fitted.before
    if (dtype, held) == ("bfloat16", "kahan"):
        assert 0 < differ == sparse.count <= k, "of numbers held in bfloat16 some may round to where they were"
    else:
        assert differ == sparse.count == k
    assert done.delta_bytes < 8 * k + 400 * len(sparse.entries)
    assert f"{k:,} numbers trained" in done.model.coverage[-1]


def test_it_is_two_plain_trainings(tmp_path: Path) -> None:
    """Full training; the top k of its difference by sorting; the start again; masked training with fresh AdamW."""
    model = pupil(tmp_path, steps=8)
    done = trained(model, RECIPE, tmp_path / "run")
    first = module(model)
    start = {name: p.detach().clone() for name, p in first.named_parameters()}
    losses = plain_training(model, first, list(start), range(4), 1e-3)
    moved = {name: (p.detach() - start[name]).abs() for name, p in first.named_parameters()}
    k = round(0.02 * sum(v.numel() for v in moved.values()))
    threshold = torch.cat([v.flatten() for v in moved.values()]).sort(descending=True).values[k - 1]
    masks = {name: v >= threshold for name, v in moved.items()}

    def mask(step: int, parameters) -> None:
        for name, p in parameters.items():
            p.grad *= masks[name]

    second = module(model)
    losses += plain_training(model, second, list(start), range(4, 8), 1e-3, mask)
    np.testing.assert_allclose(done.fitted.losses, losses, rtol=2e-4)
    changed = differing(model, done.model)
    both = sum(int((masks[name] & where).sum()) for name, where in changed.items())
    assert both > 0.98 * k, "but for numbers at the threshold, the same places"
    ends, plain = tensors(done.model), dict(second.named_parameters())
    for name, where in changed.items():
        same = where & masks[name]
        close = (ends[name] - plain[name].detach()).abs()[same] < 2e-4
        assert float(close.float().mean()) > 0.95 if same.any() else True


def test_a_state_of_the_first_phase_is_never_handed_on(tmp_path: Path) -> None:
    done = trained(pupil(tmp_path, steps=10), "lt_sft(share=0.0001, first=0.6, rate=0.003)", tmp_path / "run")
    assert [step for step, _ in done.fitted.history] == [0, 8, 10]
    assert done.fitted.best_step in (0, 8, 10)


def test_when_nothing_is_gained_the_parent_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, scores = pupil(tmp_path), iter(range(1, 9))
    monkeypatch.setattr("fivefold.training.run._score", lambda *_: float(next(scores)))
    done = trained(model, RECIPE, tmp_path / "run")
    assert done.fitted.best_step == 0 and not differing(model, done.model)
    assert assert_sparse_gives_it_back(model, done).count == 0 == done.numbers


@pytest.mark.parametrize("stop", [2, 4, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_repeats_from_either_phase(tmp_path: Path, stop: int, dtype: str) -> None:
    model = pupil(tmp_path, dtype=dtype)
    whole = trained(model, RECIPE, tmp_path / "whole")
    again = resumed(model, RECIPE, tmp_path / "resumed", stop=stop)
    assert again.fitted.losses == whole.fitted.losses and again.fitted.history == whole.fitted.history
    assert_same(whole.model, again.model)


def test_differences_learned_apart_add_up_in_any_order(tmp_path: Path) -> None:
    one, two = pupil(tmp_path), pupil(tmp_path, rows=40, seed=1)
    parts = [Sparse.load(trained(m, RECIPE, tmp_path / f"{i}").delta / "delta.safetensors")
             for i, m in enumerate((one, two))]
    stored, parent = dict(read_tensors(one.path)), hash_folder(one.path)
    sums = [compose(order).apply(stored, parent) for order in (parts, parts[::-1])]
    apart = [part.apply(stored, parent) for part in parts]
    for name, tensor in stored.items():
        before = tensor.numpy()
        a, b = (np.asarray(s[name] if isinstance(s[name], np.ndarray) else s[name].numpy()) for s in sums)
        assert a.tobytes() == b.tobytes()
        alone = [s[name] if isinstance(s[name], np.ndarray) else s[name].numpy() for s in apart]
        np.testing.assert_allclose(a, before + (alone[0] - before) + (alone[1] - before), atol=1e-6)


def test_one_step_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(Misfit, match="two phases and the plan has 1 step; give at least 2"):
        planned(pupil(tmp_path, steps=1), RECIPE)
    with pytest.raises(Misfit, match="two phases"):
        trained(pupil(tmp_path, steps=0, epochs=0.01), RECIPE, tmp_path / "run")
    assert trained(pupil(tmp_path, steps=2), RECIPE, tmp_path / "run").fitted.steps == 2


def test_the_formulas_count_what_is_there(tmp_path: Path) -> None:
    technique, model = make("lt_sft", {}), pupil(tmp_path)
    numbers = sum(p.numel() for p in module(model).parameters())
    assert sum(math.prod(s) for s in technique.shapes(model.blueprint).values()) == numbers
    mask = technique.weight_bytes(model.blueprint, 4) - make("full", {}).weight_bytes(model.blueprint, 4)
    assert mask == numbers, "a byte each"
