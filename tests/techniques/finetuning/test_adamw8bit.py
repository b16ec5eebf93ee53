"""8-bit AdamW: the code against bitsandbytes' and brute force, the trajectory against float32 AdamW."""

from pathlib import Path

import numpy as np
import pytest
import torch
from masked import pupil
from optimizing import (
    both_orders_agree,
    gaussians,
    learns,
    optimizer_of,
    resumes_exactly,
    run_state_is_the_formula,
    state_is_the_formula,
    stays_where_gradients_are_zero,
    toy,
    updated,
)

from fivefold.training.adamw import AdamW
from fivefold.training.optimizers.adamw8bit import BLOCK, SMALL, AdamW8bit, codebook, codes


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_is_bitsandbytes(signed: bool) -> None:
    theirs = pytest.importorskip("bitsandbytes.functional").create_dynamic_map(signed=signed)
    torch.testing.assert_close(codebook(signed), theirs.float().cpu(), rtol=1e-6, atol=0)
    assert len(codebook(signed)) == 256


@pytest.mark.parametrize("signed", [True, False])
def test_encoding_finds_the_nearest_value(signed: bool) -> None:
    kind = codes(signed, "cpu")
    draw = torch.Generator().manual_seed(0)
    spread = torch.rand(200_000, generator=draw) * 10.0 ** torch.randint(-8, 1, (200_000,), generator=draw)
    middle = (kind.values[1:] + kind.values[:-1]) / 2
    x = torch.cat([spread, -spread if signed else spread, kind.values, torch.nextafter(middle, torch.tensor(2.0)),
                   torch.nextafter(middle, torch.tensor(-2.0))]).clamp(0 if not signed else -1, 1)
    nearest = np.abs(x.double().numpy()[:, None] - kind.values.double().numpy()[None]).min(1)
    found = (x.double() - kind.decode(kind.encode(x)).double()).abs().numpy()
    np.testing.assert_allclose(found, nearest, rtol=1e-6, atol=1e-12)


def test_a_cell_of_the_table_holds_at_most_one_boundary() -> None:
    for signed in (True, False):
        values = codebook(signed)
        between = ((values[1:] + values[:-1]) / 2).view(torch.int32) >> 16
        assert len(set(between.tolist())) == 255


def test_large_numbers_of_a_block_are_stored_to_a_percent_and_small_ones_are_not_lost() -> None:
    kind = codes(True, "cpu")
    x = torch.linspace(0.1, 1, 1000)
    assert float(((kind.decode(kind.encode(x)) - x) / x).abs().max()) < 0.08
    assert float(((kind.decode(kind.encode(x)) - x)).abs().max()) < 0.0075
    assert bool((kind.decode(kind.encode(torch.full((1,), 1e-6))) > 0).all())


def test_it_follows_float32_adamw() -> None:
    shape = (129, 100)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    gradients = [g + bias for g in gaussians(shape, 50)]
    (ours, _), (theirs, _) = updated(AdamW8bit(), start, gradients, 1e-3), updated(AdamW(), start, gradients, 1e-3)
    moved = float((theirs - start).norm())
    assert 0 < float((ours - theirs).norm()) < 0.05 * moved
    left, wide = toy(AdamW8bit(), rate=0.01, steps=60)[0], toy(AdamW(), rate=0.01, steps=60)[0]
    assert left == pytest.approx(wide, rel=0.05) and left < 0.8


def test_small_tensors_keep_float32_averages() -> None:
    start, gradients = torch.ones(SMALL - 1), gaussians((SMALL - 1,), 5)
    ours, state = updated(AdamW8bit(), start, gradients, 1e-3)
    assert torch.equal(ours, updated(AdamW(), start, gradients, 1e-3)[0])
    assert {t.dtype for t in state.values()} == {torch.float32}


def test_a_square_is_never_nothing_under_a_mean() -> None:
    """One huge gradient per block: all other squares are below the smallest value of the code."""
    gradient = torch.full((2 * BLOCK,), 1e-5)
    gradient[::BLOCK] = 1.0
    weight, _ = updated(AdamW8bit(), torch.zeros(2 * BLOCK), [gradient, gradient, torch.zeros(2 * BLOCK)], 1e-3)
    assert float(weight.abs().max()) < 0.01


def test_state_is_the_formula(tmp_path: Path) -> None:
    state_is_the_formula(AdamW8bit())
    assert AdamW8bit().state_bytes((4, 2048)) == 2 * 8192 + 8 * 4
    assert AdamW8bit().state_bytes((8193,)) == 2 * 8193 + 8 * 5
    run_state_is_the_formula(pupil(tmp_path), "full() + adamw8bit()", tmp_path / "run")


def test_other_numbers_stay_and_both_orders_agree() -> None:
    stays_where_gradients_are_zero(AdamW8bit(), (64, 100), 1e-3)
    both_orders_agree(AdamW8bit, 0.01)


def test_it_learns_and_resumes_exactly(tmp_path: Path) -> None:
    learns(pupil(tmp_path, steps=30, dtype="bfloat16"), "full(rate=1e-3) + adamw8bit()", tmp_path / "run")
    resumes_exactly(pupil(tmp_path / "b"), "adamw8bit()", tmp_path / "resumed", stop=4)


def test_the_rate_is_the_adaptations() -> None:
    from fivefold.model import TrainPlan
    from fivefold.techniques.finetuning.adamw8bit import AdamW8bit as Technique

    assert Technique().edited(TrainPlan(learning_rate=3.0)).learning_rate == 5e-5
    kept = Technique().edited(TrainPlan(learning_rate=3.0, methods=("lora()",)))
    assert kept.learning_rate == 3.0
    assert Technique(rate=2e-3).edited(TrainPlan(methods=("lora()",))).learning_rate == 2e-3


def test_the_recipe_makes_it(tmp_path: Path) -> None:
    assert isinstance(optimizer_of("lora() + adamw8bit()", pupil(tmp_path)), AdamW8bit)
