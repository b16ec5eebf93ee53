"""LOMO against torch's SGD; it keeps nothing."""

from pathlib import Path

import torch
from masked import pupil, trained
from optimizing import (
    both_orders_agree,
    gaussians,
    learns,
    optimizer_of,
    resumes_exactly,
    state_is_the_formula,
    stays_where_gradients_are_zero,
    updated,
)

from fivefold.training.optimizers.lomo import Lomo


def test_it_is_torchs_sgd() -> None:
    start, gradients = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)), gaussians((300, 300), 6)
    theirs = torch.nn.Parameter(start.clone())
    reference = torch.optim.SGD([theirs], lr=0.1)
    for gradient in gradients:
        theirs.grad = gradient
        reference.step()
    torch.testing.assert_close(updated(Lomo(), start, gradients, 0.1)[0], theirs.detach(), rtol=1e-6, atol=1e-6)


def test_it_keeps_nothing(tmp_path: Path) -> None:
    state_is_the_formula(Lomo())
    assert Lomo().state(torch.ones(9)) == {}
    assert trained(pupil(tmp_path), "lomo()", tmp_path / "run").fitted.state_bytes == 0


def test_other_numbers_stay_and_both_orders_agree() -> None:
    stays_where_gradients_are_zero(Lomo(), (64, 100), 0.1)
    both_orders_agree(Lomo, 1.0)


def test_it_learns_and_resumes_exactly(tmp_path: Path) -> None:
    learns(pupil(tmp_path, steps=30, dtype="bfloat16"), "lomo()", tmp_path / "run", by=0.2)
    learns(pupil(tmp_path / "l", steps=30), "lora() + lomo()", tmp_path / "lora", by=0.1)
    resumes_exactly(pupil(tmp_path / "b"), "lomo()", tmp_path / "resumed", stop=4)
    assert isinstance(optimizer_of("lora() + lomo()", pupil(tmp_path / "c")), Lomo)
