"""GaLore: its subspace against the SVD, its update against Adam in that subspace, its state against the formula."""

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
    updated,
)

from fivefold.errors import Misfit
from fivefold.training.adamw import AdamW
from fivefold.training.optimizers.galore import GaLore
from fivefold.training.optimizers.subspace import leading
from fivefold.training.precision import carry, read, write

SHAPES = [(48, 80), (80, 48), (64, 64), (600, 300)]


def made(rank: int, every: int = 200, scale: float = 1.0) -> GaLore:
    return GaLore(rank=rank, every=every, scale=scale)


def decaying(shape: tuple[int, int], power: float, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    least = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], least, generator=draw)).Q
    right = torch.linalg.qr(torch.randn(shape[1], least, generator=draw)).Q
    return (left * torch.arange(1, least + 1) ** -power) @ right.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("power", "size"), [(1.0, 1.0), (0.3, 1e-12)])
def test_the_basis_carries_what_the_leading_singular_vectors_carry(
    shape: tuple[int, int], power: float, size: float
) -> None:
    gradient, rank = size * decaying(shape, power), 8
    basis = leading(gradient, rank, 1)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), atol=1e-4, rtol=0)
    kept = basis.T @ gradient if shape[0] < shape[1] else gradient @ basis
    best = torch.linalg.svdvals(gradient)[:rank].square().sum()
    assert float((kept / size).square().sum()) > 0.98 * float(best / size**2)
    assert torch.equal(basis, leading(gradient, rank, 1)), "the same step finds the same basis"


@pytest.mark.parametrize("shape", SHAPES)
def test_in_a_fixed_subspace_it_is_torchs_adam_in_rotated_coordinates(shape: tuple[int, int]) -> None:
    """Gradients of rank 4: GaLore of rank 4 sees all of them."""
    rank, is_tall = 4, shape[0] >= shape[1]
    frame = torch.linalg.qr(gaussians((min(shape), rank), 1)[0]).Q
    parts = gaussians((shape[0], rank) if is_tall else (rank, shape[1]), 10)
    gradients = [c @ frame.T if is_tall else frame @ c for c in parts]
    start = gaussians(shape, 1, seed=3)[0]
    ours, state = updated(made(rank, scale=0.5), start, gradients, 0.01)
    basis = state["basis"]
    torch.testing.assert_close(basis @ basis.T, frame @ frame.T, atol=1e-4, rtol=0)

    low = torch.nn.Parameter(torch.zeros(parts[0].shape))
    reference = torch.optim.Adam([low], lr=0.01 * 0.5, betas=(0.9, 0.98), eps=1e-8)
    for gradient in gradients:
        low.grad = gradient @ basis if is_tall else basis.T @ gradient
        reference.step()
    moved = low.detach() @ basis.T if is_tall else basis @ low.detach()
    torch.testing.assert_close(ours, start + moved, rtol=1e-4, atol=2e-5)


def test_the_update_lies_in_the_subspace_until_it_is_chosen_again() -> None:
    start = torch.zeros(48, 80)
    for steps, rank in ((5, 6), (10, 12)):
        moved, _ = updated(made(6, every=5), start, gaussians((48, 80), steps), 0.01)
        assert int(torch.linalg.matrix_rank(moved, rtol=1e-4)) == rank


def test_what_is_too_thin_is_adamws() -> None:
    for shape in ((9,), (6, 50), (50, 6)):
        start, gradients = gaussians(shape, 1, seed=3)[0], gaussians(shape, 5)
        assert torch.equal(updated(made(6), start, gradients, 0.01)[0], updated(AdamW(), start, gradients, 0.01)[0])


def test_split_weights_get_the_float32_update() -> None:
    start, gradients, galore = gaussians((80, 48), 1, seed=3)[0], gaussians((80, 48), 5), made(6, every=2)
    narrow = torch.zeros(80, 48, dtype=torch.bfloat16)
    near, state = carry(narrow, "split"), galore.state(narrow)
    write(narrow, start.clone(), near, None)
    for step, gradient in enumerate(gradients, start=1):
        galore.update(narrow, gradient, state, near, 0.01, step, None)
    assert torch.equal(read(narrow, near), updated(galore, start, gradients, 0.01)[0])


def test_state_is_the_formula(tmp_path: Path) -> None:
    state_is_the_formula(made(8))
    assert made(8).state_bytes((300, 257)) == 4 * 8 * (257 + 2 * 300)
    assert made(8).state_bytes((8, 257)) == 8 * 8 * 257
    run_state_is_the_formula(pupil(tmp_path), "full() + galore(rank=8)", tmp_path / "run")


def test_both_orders_agree() -> None:
    both_orders_agree(lambda: made(4, every=3), 0.01)


def test_it_learns_and_resumes_exactly(tmp_path: Path) -> None:
    learns(pupil(tmp_path, steps=30, dtype="bfloat16"), "galore(rank=8, every=10, rate=2e-3)", tmp_path / "run", by=0.2)
    resumes_exactly(pupil(tmp_path / "b"), "galore(rank=8, every=2)", tmp_path / "resumed", stop=4)


def test_it_does_not_go_with_masks(tmp_path: Path) -> None:
    with pytest.raises(Misfit, match="masks gradients"):
        planned(pupil(tmp_path), "child_tuning() + galore()")
