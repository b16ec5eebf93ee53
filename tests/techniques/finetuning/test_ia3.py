"""(IA)3: peft's own layers and files are the oracle; what is merged is rows and columns times the learned vectors."""

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

from fivefold.techniques._shared.lean_adapters import scaled
from fivefold.training.lean import gated
from fivefold.training.run import stored_value

FAMILIES = ("llama", "qwen2", "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_as_the_parent_and_trains_only_what_the_formula_counts(family: str, tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path, family), "ia3")
    torch.testing.assert_close(desk.logits(), reference(desk.model.path), atol=2e-5, rtol=1e-5)
    formula_is_what_is_allocated(desk)
    only_the_adapter_learns(desk)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_layers_compute_what_peft_does(family: str, tmp_path: Path) -> None:
    same_as_peft(Desk.of(pupil(tmp_path, family), "ia3").disturbed(0.3), tolerance=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_loaded_by_peft_it_is_the_model_that_was_trained(family: str, tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path, family), "ia3").disturbed(0.3)
    trained = desk.logits()
    assert (trained - reference(desk.model.path)).abs().max() > 0.05
    torch.testing.assert_close(reference(desk.merged(tmp_path / "merged")), trained, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(reference(desk.model.path, desk.saved(tmp_path / "a")), trained, atol=5e-5, rtol=1e-4)


def test_rows_of_values_and_columns_of_the_down_projection_are_scaled(tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path, "qwen2"), "ia3").disturbed(0.3)
    weights, trained = desk.delta().weights, desk.lesson.trained
    v, down = "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"
    gain, inner = (trained[f"{name}.ia3_l.default"].detach() for name in (v, down))
    torch.testing.assert_close(weights[f"{v}.weight"](), stored_value(desk.lesson, f"{v}.weight") * gain)
    torch.testing.assert_close(weights[f"{v}.bias"](), stored_value(desk.lesson, f"{v}.bias") * gain.flatten())
    torch.testing.assert_close(weights[f"{down}.weight"](), stored_value(desk.lesson, f"{down}.weight") * inner)
    assert f"{down}.bias" not in weights and len(weights) == 2 * (2 * 2 + 1)


@pytest.mark.parametrize("marked", [True, False])
def test_scaling_has_the_gradients_of_a_product(marked: bool) -> None:
    gate, up = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
    gain = (1 + torch.randn(8)).requires_grad_()
    x = gated(gate, up) if marked else torch.nn.functional.silu(gate) * up
    ours = torch.autograd.grad(scaled(x, gain).square().sum(), (gate, up, gain))
    theirs = torch.autograd.grad((torch.nn.functional.silu(gate) * up * gain).square().sum(), (gate, up, gain))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_a_gain_finer_than_bfloat16_is_not_lost() -> None:
    gain = torch.full((4096,), 1.0 + 0.75 / 256)
    assert gain.bfloat16().unique().tolist() == [1.0], "bfloat16 cannot hold this gain"
    x = torch.linspace(1, 2, 4096).bfloat16()
    moved = (scaled(x, gain).float() - x.float()).mean()
    assert float(moved) == pytest.approx(1.5 * 0.75 / 256, rel=0.3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls(dtype: str, tmp_path: Path) -> None:
    done = learned(pupil(tmp_path, dtype=dtype, steps=40), "ia3(rate=0.05)", tmp_path / "run")
    assert done.delta_bytes < 4 * done.numbers + 4096
    assert reference(done.model.path).isfinite().all()


def test_memory_for_activations(tmp_path: Path) -> None:
    keeps_what_the_formula_says(tmp_path, "ia3")
    same_when_layers_are_run_again(pupil(tmp_path), "ia3")
