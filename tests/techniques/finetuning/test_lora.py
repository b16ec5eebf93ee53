"""LoRA: peft's own layers and files are the oracle."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapting import (
    Desk,
    formula_is_what_is_allocated,
    learned,
    only_the_adapter_learns,
    pupil,
    reference,
    same_as_peft,
)
from safetensors.torch import load_file

from fivefold.engines._quantize import dequantize, quantize
from fivefold.errors import Misfit
from fivefold.recipe import Recipe
from fivefold.techniques._shared.adapters import adapted

FAMILIES = ("llama", "qwen2", "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_as_the_parent_and_trains_only_what_the_formula_counts(family: str, tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path, family), "lora(rank=4)")
    torch.testing.assert_close(desk.logits(), reference(desk.model.path), atol=2e-5, rtol=1e-5)
    formula_is_what_is_allocated(desk)
    only_the_adapter_learns(desk)


def test_its_layers_compute_what_peft_does(tmp_path: Path) -> None:
    same_as_peft(Desk.of(pupil(tmp_path, "qwen2"), "lora(rank=4)").disturbed())


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_loaded_by_peft_it_is_the_model_that_was_trained(family: str, tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path, family), "lora(rank=4)").disturbed()
    trained = desk.logits()
    assert (trained - reference(desk.model.path)).abs().max() > 0.05
    torch.testing.assert_close(reference(desk.merged(tmp_path / "merged")), trained, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(reference(desk.model.path, desk.saved(tmp_path / "a")), trained, atol=5e-5, rtol=1e-4)


def test_a_merged_weight_is_the_stored_one_and_the_scaled_product(tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path), "lora(rank=4, alpha=12.0)").disturbed()
    name = "model.layers.1.mlp.down_proj"
    layer, stored = adapted(desk.lesson)[name], load_file(desk.model.path / "model.safetensors")[f"{name}.weight"]
    want = stored + 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(desk.delta().weights[f"{name}.weight"](), want.detach())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls_and_the_adapter_has_its_true_size(dtype: str, tmp_path: Path) -> None:
    done = learned(pupil(tmp_path, dtype=dtype), "lora(rank=8, rate=0.01)", tmp_path / "run")
    assert 4 * done.numbers < done.delta_bytes < 4 * done.numbers + 8192
    assert reference(done.model.path).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", ["q4_0", "q8_0"])
def test_quantize_then_adapt_begins_and_ends_with_rounded_weights(family: str, base: str, tmp_path: Path) -> None:
    """Without a step, the merged linear layers are what llama.cpp makes of the stored ones, and nothing else is."""
    desk = Desk.of(pupil(tmp_path, family), f'lora(rank=4, base="{base}")')
    merged = load_file(desk.merged(tmp_path / "merged") / "model.safetensors")
    stored = load_file(desk.model.path / "model.safetensors")
    changed = {f"{name}.weight" for name in adapted(desk.lesson)}
    for name, weight in stored.items():
        if name in changed:
            rows = weight.T if family == "gpt2" else weight
            back = dequantize(quantize(rows.contiguous().numpy(), base), base, tuple(rows.shape))
            weight = torch.from_numpy(back.T if family == "gpt2" else back)
        torch.testing.assert_close(merged[name], weight, atol=0, rtol=0)
    torch.testing.assert_close(desk.logits(), reference(tmp_path / "merged"), atol=2e-5, rtol=1e-5)
    assert desk.delta().files["base.json"] == {"base": base}


def test_quantize_then_adapt_is_refused_where_rows_do_not_fit(tmp_path: Path) -> None:
    model = pupil(tmp_path)
    odd = model.but(blueprint=replace(model.blueprint, ffn=136))
    with pytest.raises(Misfit, match=r"has rows of 64, 136, which must be multiples of 32"):
        Recipe.parse('lora(base="q4_0")').plan(odd)
    assert Recipe.parse("lora").plan(odd)


def test_quantize_then_adapt_learns(tmp_path: Path) -> None:
    learned(pupil(tmp_path), 'lora(rank=8, rate=0.01, base="q4_0")', tmp_path / "run")
