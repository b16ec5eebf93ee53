"""Child-Tuning: F's masks against the statistics they must have, D's against a plain loop's Fisher information."""

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
    plain_loss,
    plain_training,
    planned,
    pupil,
    resumed,
    stream,
    trained,
)

from fivefold.errors import Misfit
from fivefold.model import TrainPlan
from fivefold.recipe import catalogue, make
from fivefold.techniques.finetuning.child_tuning import _fisher
from fivefold.training.adamw import AdamW
from fivefold.training.method import FineTuning, Lesson, Methods, Update
from fivefold.training.module import loss_of
from fivefold.training.precision import Dice, carry
from fivefold.training.run import _micro, prepared, stored_value

D, F = 'child_tuning(share=0.1, batches=3, rate=0.001)', 'child_tuning(mode="F", share=0.2, rate=0.001)'


def thinned(share: float, seed: int, steps: range, gradient: torch.Tensor) -> torch.Tensor:
    """(steps, ...): a gradient as F leaves it in each step."""
    model = pupil_of_one(gradient, seed)
    technique, out = make("child_tuning", {"mode": "F", "share": share}), []
    for step in steps:
        model.trained["w"].grad = gradient.clone()
        technique.gradients(model, step)
        out.append(model.trained["w"].grad)
    return torch.stack(out)


def pupil_of_one(gradient: torch.Tensor, seed: int) -> Lesson:
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    return Lesson(None, None, TrainPlan(seed=seed), trained={"w": parameter})


@pytest.mark.parametrize("share", [0.05, 0.2, 0.7])
def test_a_mask_has_mean_p_and_the_masked_gradient_is_unbiased(share: float) -> None:
    gradient = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    found = thinned(share, 1, range(1, 401), gradient)
    kept = (found != 0).float()
    assert abs(float(kept.mean()) - share) < 4 * math.sqrt(share * (1 - share) / kept.numel())
    torch.testing.assert_close(found[kept.bool()], (gradient / share).expand_as(found)[kept.bool()])
    error = found.mean(0) - gradient
    spread = gradient.abs() * math.sqrt((1 - share) / share / 400)
    assert float((error / spread).square().mean()) == pytest.approx(1, abs=0.15), "as far off as chance allows"
    assert abs(float((error / spread).mean())) < 4 / math.sqrt(2000)


def test_draws_are_independent_and_a_function_of_seed_and_step() -> None:
    ones = torch.ones(30_000)
    again = thinned(0.3, 1, range(1, 3), ones)
    torch.manual_seed(1234)
    assert torch.equal(again, thinned(0.3, 1, range(1, 3), ones))
    for one, two in ((again[0], again[1]), (again[0], thinned(0.3, 2, range(1, 2), ones)[0])):
        both = float(((one != 0) & (two != 0)).float().mean())
        assert abs(both - 0.09) < 4 * math.sqrt(0.09 * 0.91 / 30_000)


def fisher(model, batches: int) -> dict[str, torch.Tensor]:
    """Squared gradients of whole steps by a plain loop over the whole logits."""
    made = module(model)
    total = {name: torch.zeros_like(p) for name, p in made.named_parameters()}
    for step in range(batches):
        made.zero_grad()
        plain_loss(made, stream(model).step(step)).backward()
        for name, p in made.named_parameters():
            total[name] += p.grad.square() / batches
    return total


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Lesson:
    """A D-run's lesson after `ready`, with steps of several batches."""
    return ready(pupil(tmp_path_factory.mktemp("d"), tokens_per_step=512, at_once=256))


def ready(model) -> Lesson:
    model = planned(model, D)
    methods = Methods.of(model.train)
    out = prepared(model, methods.adaptation, methods)
    methods.adaptation.ready(out, loss_of(out.module), lambda step: _micro(stream(model).step(step)))
    return out


def test_the_child_is_the_brute_force_top_p_of_a_plain_fisher(lesson: Lesson) -> None:
    reference = fisher(lesson.model, 3)
    count = round(0.1 * sum(v.numel() for v in reference.values()))
    threshold = torch.cat([v.flatten() for v in reference.values()]).sort(descending=True).values[count - 1]
    masks = lesson.extra["masks"]
    assert sum(int(m.sum()) for m in masks.values()) == count
    for name, mask in masks.items():
        clear = (reference[name] - threshold).abs() > 1e-3 * threshold
        assert torch.equal(mask[clear], (reference[name] >= threshold)[clear]), name
        assert float(clear.float().mean()) > 0.99
    assert all(p.grad is None for p in lesson.trained.values())


def test_fisher_information_is_that_of_a_plain_loop(lesson: Lesson) -> None:
    reference = fisher(lesson.model, 3)
    steps = [_micro(stream(lesson.model).step(step)) for step in range(3)]
    found = _fisher(lesson.trained, loss_of(lesson.module), steps)
    assert [len(step) for step in steps] == [2, 2, 2]
    for name, value in found.items():
        torch.testing.assert_close(value, reference[name], rtol=1e-3, atol=float(1e-5 * reference[name].max()))


def test_the_child_alone_learns_and_like_plain_training_of_it(lesson: Lesson, tmp_path: Path) -> None:
    model, masks = pupil(tmp_path, tokens_per_step=512, at_once=256), lesson.extra["masks"]
    done = trained(model, D, tmp_path / "run")
    changed = differing(model, done.model)
    for name, where in changed.items():
        assert not (where & ~masks[name]).any()
    assert sum(int(w.sum()) for w in changed.values()) == done.numbers == sum(int(m.sum()) for m in masks.values())

    def mask(step: int, parameters) -> None:
        for name, p in parameters.items():
            p.grad *= masks[name]

    losses = plain_training(model, module(model), list(masks), range(6), 1e-3, mask)
    np.testing.assert_allclose(done.fitted.losses, losses, rtol=1e-4)
    assert done.fitted.after < done.fitted.before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("held", ["split", "kahan"])
def test_the_sparse_file_gives_the_model_back(tmp_path: Path, dtype: str, held: str) -> None:
    model = pupil(tmp_path, dtype=dtype, held=held)
    done = trained(model, D, tmp_path / "run")
    sparse = assert_sparse_gives_it_back(model, done)
    assert 0 < sparse.count <= done.numbers
    assert done.delta_bytes < 8 * done.numbers + 400 * len(sparse.entries)


def test_every_weight_moves_in_f_and_the_whole_is_its_difference(tmp_path: Path) -> None:
    model = pupil(tmp_path)
    done = trained(model, F, tmp_path / "run")
    moved = sum(int(w.sum()) for w in differing(model, done.model).values())
    assert moved > 0.5 * done.numbers and done.fitted.after < done.fitted.before
    assert done.delta_bytes == 4 * done.numbers, "the trained tensors, float32"


@pytest.mark.parametrize("recipe", [D, F])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_repeats(tmp_path: Path, recipe: str, dtype: str) -> None:
    model = pupil(tmp_path, dtype=dtype)
    whole = trained(model, recipe, tmp_path / "whole")
    again = resumed(model, recipe, tmp_path / "resumed", stop=4)
    assert again.fitted.losses == whole.fitted.losses and again.fitted.history == whole.fitted.history
    assert_same(whole.model, again.model)


def test_the_formulas_count_what_is_there(lesson: Lesson) -> None:
    technique = make("child_tuning", {})
    blueprint = lesson.model.blueprint
    assert sum(math.prod(s) for s in technique.shapes(blueprint).values()) == sum(
        p.numel() for p in lesson.trained.values())
    without = make("child_tuning", {"mode": "F"}).weight_bytes(blueprint, 4)
    assert technique.weight_bytes(blueprint, 4) - without == sum(m.nbytes for m in lesson.extra["masks"].values())


def test_the_stored_value_is_the_file_s(lesson: Lesson) -> None:
    for name, p in lesson.trained.items():
        assert torch.equal(stored_value(lesson, name), p.data)


FOLLOWING = [name for name, kind in catalogue().items() if issubclass(kind, Update) and kind.by_number]


@pytest.mark.parametrize("name", [*FOLLOWING, "default"])
@pytest.mark.parametrize("held", ["float32", "split", "kahan", "stochastic", "nearest"])
def test_an_update_by_number_leaves_masked_numbers_alone(name: str, held: str) -> None:
    optimizer = AdamW() if name == "default" else make(name, {}).optimizer(TrainPlan())
    weight = torch.nn.Parameter(torch.randn(48, 64, generator=torch.Generator().manual_seed(0)))
    weight.data = weight.data.to(torch.float32 if held == "float32" else torch.bfloat16)
    start, beside, states, dice = weight.data.clone(), carry(weight.data, held), {}, Dice(0)
    draw = torch.Generator().manual_seed(1)
    mask = torch.rand(weight.shape, generator=draw) < 0.3
    for step in range(1, 5):
        optimizer.begin(step, {"w": weight}, states)
        states.setdefault("w", optimizer.state(weight.data))
        gradient = (torch.randn(weight.shape, generator=draw) * mask).to(weight.dtype)
        optimizer.update(weight.data, gradient, states["w"], beside, 0.05, step, dice if held == "stochastic" else None)
    assert torch.equal(weight.data[~mask], start[~mask]) and not torch.equal(weight.data[mask], start[mask])
    assert not any(tensor[~mask].any() for tensor in beside.values())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_update_that_moves_masked_numbers_is_refused(
    tmp_path: Path, order: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dense(Update):
        name = "dense"

    class Kept(Update):
        name = "kept"
        by_number = True

    parts: list[FineTuning] = [make("child_tuning", {}), Dense()]
    first, second = parts[order[0]], parts[order[1]]
    monkeypatch.setattr("fivefold.training.method.techniques", lambda plan: [first])
    with pytest.raises(Misfit, match="child_tuning masks gradients, and dense also moves"):
        second.check(pupil(tmp_path))
    monkeypatch.setattr("fivefold.training.method.techniques", lambda plan: [Kept()])
    parts[0].check(pupil(tmp_path))
