"""APOLLO against its formulas written out, its statistics against Adam's, its state against the formula."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from masked import pupil
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

from fivefold.training.adamw import AdamW
from fivefold.training.optimizers.apollo import GROWTH, Apollo
from fivefold.training.optimizers.subspace import random

SHAPES = [(48, 80), (80, 48), (600, 300)]


def made(rank: int = 6, every: int = 200, by_channel: bool = True, scale: float = 1.0) -> Apollo:
    return Apollo(rank=rank, every=every, scale=scale, by_channel=by_channel)


def written_out(
    weight: torch.Tensor, gradients: list[torch.Tensor], rank: int, every: int, by_channel: bool, rate: float
) -> torch.Tensor:
    """The paper's algorithm on whole matrices in float64, wide side last."""
    turned = weight.shape[0] >= weight.shape[1]
    w = (weight.T if turned else weight).double().clone()
    mean = square = torch.zeros(rank, w.shape[1], dtype=torch.float64)
    before = None
    for t, given in enumerate(gradients, start=1):
        g = (given.T if turned else given).double()
        r = random(tuple(weight.shape), rank, (t - 1) // every).double().T @ g
        mean, square = 0.9 * mean + 0.1 * r, 0.98 * square + 0.02 * r * r
        adam = mean / (1 - 0.9**t) / ((square / (1 - 0.98**t)).sqrt() + 1e-8)
        s = adam.norm(dim=0) / r.norm(dim=0) if by_channel else adam.norm() / r.norm()
        change = g * s * math.sqrt(w.shape[0] / rank)
        if before is not None and change.norm() > GROWTH * before:
            change *= GROWTH * before / change.norm()
        before = change.norm()
        w -= rate * change
    return (w.T if turned else w).float()


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_paper_written_out(shape: tuple[int, int], by_channel: bool) -> None:
    start = gaussians(shape, 1, seed=3)[0]
    gradients = [g * (1 + i % 4) for i, g in enumerate(gaussians(shape, 9))]
    found, _ = updated(made(6, 4, by_channel), start, gradients, 0.01)
    torch.testing.assert_close(found, written_out(start, gradients, 6, 4, by_channel, 0.01), rtol=1e-4, atol=1e-5)


def test_a_random_space_keeps_lengths_on_average() -> None:
    vector = torch.linspace(-1, 1, 40)
    lengths = [float((random((40, 90), 4, epoch).T @ vector).square().sum()) for epoch in range(4000)]
    found, exact = sum(lengths) / len(lengths), float(vector.square().sum())
    assert found == pytest.approx(exact, rel=5 * math.sqrt(2 / (4 * len(lengths))))
    assert not torch.equal(random((40, 90), 4, 0), random((40, 90), 4, 1))


@pytest.mark.parametrize("shape", [(256, 400), (400, 256)])
def test_channels_are_lengthened_as_adam_lengthens_them(shape: tuple[int, int]) -> None:
    """After equal gradients Adam's update is their sign: every channel has length sqrt(256)."""
    size = torch.logspace(-3, 3, 400)
    gradient = gaussians(shape, 1)[0] * (size if shape[1] == 400 else size[:, None])
    moved = -updated(made(128), torch.zeros(shape), [gradient], 1.0)[0]
    ratio = moved / gradient
    along = 0 if shape[1] == 400 else 1
    torch.testing.assert_close(ratio, ratio.mean(along, keepdim=True).expand(shape), rtol=1e-3, atol=0)
    lengths = moved.norm(dim=along) / math.sqrt(256)
    assert float(lengths.mean()) == pytest.approx(1, abs=0.03) and float(lengths.std()) < 3 / math.sqrt(2 * 128)


def test_an_update_is_at_most_a_hundredth_longer_than_the_one_before() -> None:
    gradients = gaussians((48, 80), 30)
    apollo, weight = made(), torch.zeros(48, 80)
    state, lengths = apollo.state(weight), []
    for step, gradient in enumerate(gradients, start=1):
        before = weight.clone()
        apollo.update(weight, gradient * (100 if step == 20 else 1), state, {}, 1.0, step, None)
        lengths.append(float((weight - before).norm()))
    growth = [b / a for a, b in itertools.pairwise(lengths)]
    assert max(growth) == pytest.approx(GROWTH, rel=1e-4)


def test_what_is_too_thin_is_adamws() -> None:
    for shape in ((9,), (6, 50), (50, 6)):
        start, gradients = gaussians(shape, 1, seed=3)[0], gaussians(shape, 5)
        assert torch.equal(updated(made(6), start, gradients, 0.01)[0], updated(AdamW(), start, gradients, 0.01)[0])


def test_state_is_the_formula(tmp_path: Path) -> None:
    state_is_the_formula(made())
    state_is_the_formula(made(1, by_channel=False))
    assert made().state_bytes((300, 257)) == 4 * (2 * 6 * 300 + 1)
    assert made(1).state_bytes((300, 257)) == 4 * (2 * 300 + 1)
    run_state_is_the_formula(pupil(tmp_path), 'full() + apollo(mode="tensor", rank=1)', tmp_path / "run")


def test_other_numbers_stay_and_both_orders_agree() -> None:
    stays_where_gradients_are_zero(made(), (64, 100), 1e-3)
    stays_where_gradients_are_zero(made(), (100, 64), 1e-3)
    both_orders_agree(made, 0.01)
    both_orders_agree(lambda: made(1, by_channel=False), 0.01)


@pytest.mark.parametrize("recipe", ["apollo(rank=8, every=10, rate=5e-4)",
                                    'apollo(mode="tensor", rank=1, every=10, rate=2e-4)'])
def test_it_learns(tmp_path: Path, recipe: str) -> None:
    learns(pupil(tmp_path, steps=30, dtype="bfloat16"), recipe, tmp_path / "run", by=0.2)


def test_it_resumes_exactly(tmp_path: Path) -> None:
    resumes_exactly(pupil(tmp_path), "apollo(rank=8, every=2)", tmp_path / "resumed", stop=4)
