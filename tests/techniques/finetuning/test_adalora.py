"""AdaLoRA: peft's own layers, penalty, allocator and files are the oracle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import (
    Desk,
    formula_is_what_is_allocated,
    keeps_what_the_formula_says,
    learned,
    only_the_adapter_learns,
    planned,
    pupil,
    reference,
    same_as_peft,
    same_when_layers_are_run_again,
)

from fivefold.errors import Misfit
from fivefold.techniques._shared.adapters import NAME, adapted
from fivefold.techniques.finetuning.lora import Lora
from fivefold.training.checkpoint import Keeper
from fivefold.training.run import run

FAMILIES = ("llama", "qwen2", "gpt2")


def ranks(desk: Desk) -> int:
    return sum(int((layer.lora_E[NAME] != 0).sum()) for layer in adapted(desk.lesson).values())


def steps(desk: Desk, first: int, last: int, *, rate: float = 0.01) -> None:
    """Steps of plain gradient descent through the hooks, in the loop's order."""
    for step in range(first, last + 1):
        (desk.loss() + desk.adaptation.penalty(desk.lesson, step)).backward()
        desk.adaptation.gradients(desk.lesson, step)
        for p in desk.lesson.trained.values():
            p.data -= rate * p.grad
            p.grad = None
        desk.adaptation.stepped(desk.lesson, step)


def opened(model: Any, recipe: str) -> Desk:
    desk = Desk.of(model, recipe)
    desk.adaptation.ready(desk.lesson, lambda batch: torch.zeros(()), lambda step: [])
    return desk


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_as_the_parent_and_trains_only_what_the_formula_counts(family: str, tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path, family), "adalora(rank=4)")
    torch.testing.assert_close(desk.logits(), reference(desk.model.path), atol=2e-5, rtol=1e-5)
    formula_is_what_is_allocated(desk)
    only_the_adapter_learns(desk)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_layers_compute_what_peft_does(family: str, tmp_path: Path) -> None:
    same_as_peft(Desk.of(pupil(tmp_path, family), "adalora(rank=4)").disturbed(0.3), tolerance=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_loaded_by_peft_it_is_the_model_that_was_trained(family: str, tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path, family), "adalora(rank=4)").disturbed(0.3)
    for i, layer in enumerate(adapted(desk.lesson).values()):
        layer.lora_E[NAME].data[: i % 5] = 0
    trained = desk.logits()
    assert (trained - reference(desk.model.path)).abs().max() > 0.05
    torch.testing.assert_close(reference(desk.merged(tmp_path / "merged")), trained, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(reference(desk.model.path, desk.saved(tmp_path / "a")), trained, atol=5e-5, rtol=1e-4)


def test_a_layer_that_lost_all_its_triplets_is_saved_too(tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path), "adalora(rank=4)")
    torch.testing.assert_close(reference(desk.model.path, desk.saved(tmp_path / "a")), reference(desk.model.path))


def test_the_penalty_is_peft_s(tmp_path: Path) -> None:
    """Of a batch with labels peft adds it to the loss."""
    desk = Desk.of(pupil(tmp_path), "adalora(rank=4, orthogonality=0.7)").disturbed(0.3)
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        plain = desk.lesson.module(ids, labels=ids).loss
        whole = desk.lesson.extra["tuner"](input_ids=ids, labels=ids).loss
        penalty = desk.adaptation.penalty(desk.lesson, 1)
    torch.testing.assert_close(whole - plain, penalty, atol=1e-5, rtol=1e-5)
    assert Desk.of(pupil(tmp_path / "b"), "adalora(orthogonality=0.0)").adaptation.penalty(desk.lesson, 1) is None


def test_it_cuts_as_peft_does(tmp_path: Path) -> None:
    """A second module, trained by the same steps and cut by peft's own update_and_allocate alone."""
    ours, theirs = (opened(pupil(tmp_path / n, steps=12), "adalora(rank=4, every=2)") for n in "ab")
    for step in range(1, 13):
        steps(ours, step, step)
        (theirs.loss() + theirs.adaptation.penalty(theirs.lesson, step)).backward()
        for p in theirs.lesson.trained.values():
            p.data -= 0.01 * p.grad
        theirs.lesson.extra["tuner"].update_and_allocate(step)
        theirs.lesson.module.zero_grad(set_to_none=True)
        for name, p in ours.lesson.trained.items():
            assert torch.equal(p, theirs.lesson.trained[name]), (step, name)


def test_it_ends_with_the_ranks_it_was_given(tmp_path: Path) -> None:
    desk = opened(pupil(tmp_path, steps=20), "adalora(rank=4)")
    layers = len(adapted(desk.lesson))
    steps(desk, 1, 2)
    assert 4 * layers < ranks(desk) <= 6 * layers, "nothing is cut in the first tenth of the steps"
    steps(desk, 3, 12)
    assert ranks(desk) == 4 * layers
    steps(desk, 13, 20)
    assert ranks(desk) == 4 * layers
    apart = {int((layer.lora_E[NAME] != 0).sum()) for layer in adapted(desk.lesson).values()}
    assert len(apart) > 1, "ranks move between layers"


@pytest.mark.parametrize("total", [2, 3, 5, 40])
def test_a_short_schedule_is_one_too(total: int, tmp_path: Path) -> None:
    desk = opened(pupil(tmp_path, steps=total), "adalora(rank=2)")
    steps(desk, 1, total)
    assert ranks(desk) == 2 * len(adapted(desk.lesson))
    with pytest.raises(Misfit, match="needs 2 steps"):
        opened(pupil(tmp_path / "b", steps=1), "adalora(rank=2)")


@pytest.mark.parametrize("stop", [3, 9, 15])
def test_a_killed_run_goes_on_as_if_it_had_not_been(stop: int, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def listen(step: Any) -> None:
        if step.step == stop:
            raise Killed

    recipe = "adalora(rank=4, rate=0.01)"
    whole = run(planned(pupil(tmp_path), recipe), tmp_path / "whole")
    model = planned(pupil(tmp_path / "b"), recipe)
    with pytest.raises(Killed):
        run(model, tmp_path / "killed", listen=listen, keeper=Keeper(tmp_path / "state", "run", every=0.0))
    again = run(model, tmp_path / "again", keeper=Keeper(tmp_path / "state", "run", every=0.0))
    assert again.fitted.losses == whole.fitted.losses and again.fitted.history == whole.fitted.history
    for one, other in zip(sorted((tmp_path / "whole").rglob("*.safetensors")),
                          sorted((tmp_path / "again").rglob("*.safetensors")), strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_what_lies_beside_the_weights_is_counted(tmp_path: Path) -> None:
    desk = opened(pupil(tmp_path), "adalora(rank=4)")
    allocator, kept = desk.lesson.extra["tuner"].rankallocator, desk.lesson.extra["kept"]
    tables = [t for name in ("ipt", "exp_avg_ipt", "exp_avg_unc") for t in getattr(allocator, name).values()]
    plain, ours = (one.weight_bytes(desk.model.blueprint, 4) for one in (Lora(), desk.adaptation))
    products = [p for name, p in desk.lesson.trained.items() if "lora_A" in name]
    assert ours - plain == sum(t.nbytes for t in (*tables, *kept.values(), *products))


def test_an_update_that_leaves_gradients_out_is_refused(tmp_path: Path) -> None:
    desk = opened(pupil(tmp_path), "adalora(rank=4)")
    with pytest.raises(Misfit, match="adalora needs the gradient of every number"):
        desk.adaptation.stepped(desk.lesson, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls(dtype: str, tmp_path: Path) -> None:
    done = learned(pupil(tmp_path, dtype=dtype, steps=30), "adalora(rank=8, rate=0.02)", tmp_path / "run")
    assert done.delta_bytes < 4 * done.numbers + 16384
    assert reference(done.model.path).isfinite().all()


def test_memory_for_activations(tmp_path: Path) -> None:
    keeps_what_the_formula_says(tmp_path, "adalora(rank=4)")
    same_when_layers_are_run_again(pupil(tmp_path), "adalora(rank=4)")
