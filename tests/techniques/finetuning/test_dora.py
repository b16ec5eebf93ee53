"""DoRA: peft's own layers and files are the oracle."""

from pathlib import Path

import pytest
import torch
from adapting import (
    Desk,
    formula_is_what_is_allocated,
    keeps_what_the_formula_says,
    learned,
    only_the_adapter_learns,
    pupil,
    reference,
    same_as_peft,
    same_when_layers_are_run_again,
)

from fivefold.techniques._shared.adapters import adapted
from fivefold.techniques.finetuning.lora import Lora

FAMILIES = ("llama", "qwen2", "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_as_the_parent_and_trains_only_what_the_formula_counts(family: str, tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path, family), "dora(rank=4)")
    torch.testing.assert_close(desk.logits(), reference(desk.model.path), atol=2e-5, rtol=1e-5)
    formula_is_what_is_allocated(desk)
    only_the_adapter_learns(desk)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_layers_compute_what_peft_does(family: str, tmp_path: Path) -> None:
    same_as_peft(Desk.of(pupil(tmp_path, family), "dora(rank=4)").disturbed(), tolerance=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_loaded_by_peft_it_is_the_model_that_was_trained(family: str, tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path, family), "dora(rank=4)").disturbed()
    trained = desk.logits()
    assert (trained - reference(desk.model.path)).abs().max() > 0.05
    torch.testing.assert_close(reference(desk.merged(tmp_path / "merged")), trained, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(reference(desk.model.path, desk.saved(tmp_path / "a")), trained, atol=5e-5, rtol=1e-4)


def test_a_merged_row_has_the_learned_length(tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path), "dora(rank=4)").disturbed()
    weights = desk.delta().weights
    for name, layer in adapted(desk.lesson).items():
        lengths = weights[f"{name}.weight"]().norm(dim=1)
        torch.testing.assert_close(lengths, layer.lora_magnitude_vector["default"].weight.detach())


def test_in_bfloat16_the_lengths_are_those_of_the_stored_weights(tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path, dtype="bfloat16"), "dora(rank=4)")
    assert desk.lesson.module.dtype == torch.bfloat16
    torch.testing.assert_close(reference(desk.merged(tmp_path / "merged")), reference(desk.model.path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls(dtype: str, tmp_path: Path) -> None:
    done = learned(pupil(tmp_path, dtype=dtype), "dora(rank=8, rate=0.01)", tmp_path / "run")
    assert done.delta_bytes < 1.2 * 4 * done.numbers + 8192
    assert reference(done.model.path).isfinite().all()


def test_what_lies_beside_the_weights_is_counted(tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path), "dora(rank=4)")
    plain, ours = (one.weight_bytes(desk.model.blueprint, 4) for one in (Lora(), desk.adaptation))
    assert ours - plain == sum(layer.squares.nbytes for layer in adapted(desk.lesson).values())


def test_memory_for_activations(tmp_path: Path) -> None:
    keeps_what_the_formula_says(tmp_path, "dora(rank=4)")
    same_when_layers_are_run_again(pupil(tmp_path), "dora(rank=4)")
