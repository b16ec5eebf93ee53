"""AdaLomo against torch's Adafactor, whose update it is."""

from pathlib import Path

import pytest
import torch
from masked import planned, pupil
from optimizing import (
    both_orders_agree,
    gaussians,
    learns,
    resumes_exactly,
    run_state_is_the_formula,
    state_is_the_formula,
    stays_where_gradients_are_zero,
    updated,
)

from fivefold.training.optimizers.lomo import AdaLomo


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (300, 257), (40,), (70_000,)])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_it_is_torchs_adafactor(shape: tuple[int, ...], size: float) -> None:
    """`size` 1e-6: the tensor's own size is below the least that counts."""
    start = size * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gradients = [g * 10.0 ** (i % 3 - 1) for i, g in enumerate(gaussians(shape, 8))]
    theirs = torch.nn.Parameter(start.clone())
    reference = torch.optim.Adafactor([theirs], lr=0.01, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0, weight_decay=0.0)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        reference.step()
    found, _ = updated(AdaLomo(), start, gradients, 0.01)
    torch.testing.assert_close(found, theirs.detach(), rtol=1e-4, atol=1e-7 * max(1e-3, size))


def test_no_tensor_moves_by_more_than_the_rate_of_its_size() -> None:
    start = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for scale in (1e-4, 1.0, 1e4):
        moved = updated(AdaLomo(), start, [scale * g for g in gaussians((64, 64), 1)], 0.01)[0] - start
        assert float(moved.norm() / start.norm()) == pytest.approx(0.01, rel=0.05)


def test_state_is_a_number_per_row_and_column(tmp_path: Path) -> None:
    state_is_the_formula(AdaLomo())
    assert AdaLomo().state_bytes((300, 257)) == 4 * 557 and AdaLomo().state_bytes((9,)) == 36
    run_state_is_the_formula(pupil(tmp_path), "full() + adalomo()", tmp_path / "run")


def test_other_numbers_stay_and_both_orders_agree() -> None:
    stays_where_gradients_are_zero(AdaLomo(), (64, 100), 0.1)
    both_orders_agree(AdaLomo, 0.01)


def test_it_learns_and_resumes_exactly(tmp_path: Path) -> None:
    learns(pupil(tmp_path, steps=30, dtype="bfloat16"), "adalomo(rate=5e-3)", tmp_path / "run", by=0.2)
    learns(pupil(tmp_path / "l", steps=30), "lora() + adalomo()", tmp_path / "lora", by=0.1)
    resumes_exactly(pupil(tmp_path / "b"), "adalomo()", tmp_path / "resumed", stop=4)


def test_its_rate_is_its_own(tmp_path: Path) -> None:
    model = pupil(tmp_path)
    rates = {text: planned(model, text).train.learning_rate for text in ("adalomo()", "full() + adalomo()",
                                                                        "lora() + adalomo()", "adalomo(rate=0.1)")}
    assert list(rates.values()) == [5e-4, 5e-4, 5e-2, 0.1]
