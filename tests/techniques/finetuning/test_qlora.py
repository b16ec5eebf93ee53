"""QLoRA: NF4 against its definition, the passes against the weights it stands for, peft's files against both."""

import math
from pathlib import Path

import numpy as np
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
    same_when_layers_are_run_again,
)
from safetensors.torch import load_file
from scipy.stats import norm

from fivefold.engines._peft import bitsandbytes
from fivefold.errors import MissingExtra
from fivefold.recipe import Recipe
from fivefold.techniques._shared.adapters import adapted
from fivefold.techniques._shared.modules import linears
from fivefold.techniques._shared.nf4 import _packed, exact, load_nf4, nf4_bytes
from fivefold.techniques.finetuning import qlora

FAMILIES = ("llama", "qwen2", "gpt2")


def parts(layer: torch.nn.Module) -> list[torch.Tensor]:
    """All that lies in memory for a packed matrix, the two tables that all share last."""
    state = layer.quant_state
    return [layer.weight.data, state.absmax, state.state2.absmax, state.offset, state.code, state.state2.code]


def test_the_levels_are_quantiles_of_the_normal_distribution() -> None:
    """Dettmers et al., section 3: 8 below and 9 above zero, which both sides share, scaled to [-1, 1]."""
    tail = 1 - (1 / 30 + 1 / 32) / 2
    above, below = norm.ppf(np.linspace(tail, 0.5, 9)), -norm.ppf(np.linspace(tail, 0.5, 8))
    want = np.sort(np.concatenate([above, below[:-1]])) / above[0]
    got = bitsandbytes().functional.get_4bit_type("nf4", device="cpu").numpy()
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_weight_is_the_nearest_level_of_its_block() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 128)
    layer = _packed(weight, None, torch.float32)
    levels = layer.quant_state.code
    size = weight.view(-1, 64).abs().amax(1)
    steps = (weight.view(-1, 64) / size[:, None])[:, :, None] - levels
    nearest = levels[steps.abs().argmin(-1)]
    got = exact(layer).view(-1, 64)
    ratio = got.abs().amax(1) / size
    assert float((ratio - 1).abs().max()) < 0.02, "double quantization moves a block's size by a percent or so"
    torch.testing.assert_close(got / got.abs().amax(1, keepdim=True), nearest, atol=1e-5, rtol=1e-5)


def test_a_weight_takes_4_127_bits() -> None:
    layer = _packed(torch.randn(512, 512), None, torch.bfloat16)
    codes, magnitudes, second, mean, *_ = parts(layer)
    bits = 8 * (codes.nbytes + magnitudes.nbytes + second.nbytes) / 512**2
    assert bits == 4 + 8 / 64 + 32 / (64 * 256) == pytest.approx(4.127, abs=5e-4)
    assert nf4_bytes(512**2) == sum(t.nbytes for t in (codes, magnitudes, second, mean))


def test_a_pass_in_evaluation_mode_leaves_the_weight_as_it_is() -> None:
    """bitsandbytes alone rounds the scales then, and has no gradient afterwards."""
    layer = _packed(torch.randn(64, 64), None, torch.float32).eval()
    weight, x = exact(layer), torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ weight.T)
    assert torch.equal(exact(layer), weight)
    layer.train()(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_counts_every_byte_of_the_weights(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = pupil(tmp_path, family)
    module = load_nf4(model, dtype)
    packed = [part for _, part in linears(module)]
    held = {t.data_ptr(): t.nbytes for layer in packed for t in parts(layer)}
    held |= {p.data_ptr(): p.nbytes for p in module.parameters() if p.dtype != torch.uint8}
    assert qlora.Qlora().weight_bytes(model.blueprint, dtype.itemsize) == sum(held.values())
    assert len(packed) == sum(p.dtype == torch.uint8 for p in module.parameters())
    assert not any(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_as_the_packed_parent_and_trains_only_what_the_formula_counts(family: str, tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path, family), 'qlora(rank=4, base="nf4")')
    assert len(adapted(desk.lesson)) == 2 * (4 if family == "gpt2" else 7)
    formula_is_what_is_allocated(desk)
    only_the_adapter_learns(desk)
    torch.testing.assert_close(reference(desk.merged(tmp_path / "merged")), desk.logits(), atol=2e-5, rtol=1e-5)
    assert (desk.logits() - reference(desk.model.path)).abs().max() > 0.01, "four bits are an approximation"


@pytest.mark.parametrize("family", FAMILIES)
def test_its_passes_are_those_of_the_weights_it_stands_for(family: str, tmp_path: Path) -> None:
    """Logits and gradients of lora in a folder that holds the unpacked weights; evaluation changes nothing."""
    model = pupil(tmp_path, family)
    desk = Desk.of(model, 'qlora(rank=4, base="nf4")')
    other = Desk.of(model.but(path=desk.merged(tmp_path / "merged")), "lora(rank=4)")
    for one in (desk, other):
        one.disturbed().lesson.module.eval()
    torch.testing.assert_close(desk.logits(), other.logits(), atol=2e-5, rtol=1e-5)
    theirs = other.gradients()
    for name, gradient in desk.gradients().items():
        torch.testing.assert_close(gradient, theirs[name], atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_into_either_base(family: str, tmp_path: Path) -> None:
    model = pupil(tmp_path, family)
    trained = Desk.of(model, 'qlora(rank=4, base="nf4")').disturbed()
    logits = trained.logits()
    torch.testing.assert_close(reference(trained.merged(tmp_path / "nf4")), logits, atol=5e-5, rtol=1e-4)

    stored = Desk.of(model, "qlora(rank=4)").disturbed()
    adapter = stored.saved(tmp_path / "adapter")
    by_peft = reference(model.path, adapter)
    torch.testing.assert_close(reference(stored.merged(tmp_path / "stored")), by_peft, atol=5e-5, rtol=1e-4)
    assert (by_peft - logits).abs().max() > 0.01, "the two bases differ by the rounding"
    back = Desk.of(model, 'qlora(rank=4, base="nf4")').merged(tmp_path / "parent")
    torch.testing.assert_close(reference(back, adapter), logits, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls_and_the_base_stays_as_it_was(dtype: str, tmp_path: Path) -> None:
    model = pupil(tmp_path, dtype=dtype)
    done = learned(model, "qlora(rank=8, rate=0.01)", tmp_path / "run")
    assert 4 * done.numbers < done.delta_bytes < 4 * done.numbers + 8192
    before, after = (load_file(m.path / "model.safetensors") for m in (model, done.model))
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        n for n in before if n.endswith("_proj.weight")
    }


def test_it_is_refused_without_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qlora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"bitsandbytes is not installed; run: pip install 'fivefold\[qlora\]'"):
        Recipe.parse("qlora").check(pupil(tmp_path))


def test_a_small_matrix_has_a_whole_block(tmp_path: Path) -> None:
    layer = _packed(torch.randn(3, 5), None, torch.float32)
    assert nf4_bytes(15) == sum(t.nbytes for t in parts(layer)[:-2]) and math.ceil(15 / 2) == layer.weight.nbytes


def test_memory_for_activations(tmp_path: Path) -> None:
    keeps_what_the_formula_says(tmp_path, "qlora(rank=4)")
    same_when_layers_are_run_again(pupil(tmp_path), "qlora(rank=4)")
