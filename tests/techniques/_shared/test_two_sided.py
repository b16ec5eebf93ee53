"""Feedback over rows and columns against textbook corrections on the Kronecker product, and against columns alone."""

import itertools

import numpy as np
import pytest
import torch

from fivefold.engines._native import available
from fivefold.engines._quantize import dequantize, quantize
from fivefold.techniques._shared.blocks import put_together, take_apart
from fivefold.techniques._shared.feedback import factor, round_with_feedback
from fivefold.techniques._shared.two_sided import _between, _damped, _Work, round_both_ways

pytestmark = pytest.mark.skipif(available("two_sided") is not None, reason="there is no C++ compiler")


def metric(size: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=draw) / size**0.5 + torch.eye(size)
    inputs = torch.randn(8 * size, size, generator=draw) @ mixing
    return inputs.T @ inputs / len(inputs)


def problem(rows: int, columns: int) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    matrix = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    return matrix, metric(columns, 1), metric(rows, 2)


def lost(packed: np.ndarray, type: str, matrix: np.ndarray, a: torch.Tensor, b: torch.Tensor) -> float:
    error = torch.from_numpy(dequantize(packed, type, matrix.shape) - matrix).double()
    return float(torch.trace(a.double() @ error.T @ b.double() @ error))


def by_hand(matrix: np.ndarray, a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Optimal Brain Quantization of vec(W) under the Kronecker product, one element after the other, q4_0 steps given;
    the inverse of what is left computed anew each time."""
    work, full = matrix.astype(np.float64).reshape(-1), np.kron(b, a)
    step = np.repeat(scale.reshape(len(matrix), -1), 32, 1).reshape(-1)
    out = np.zeros_like(work)
    for i in range(len(work)):
        out[i] = np.clip(np.round(work[i] / step[i]), -8, 7) * step[i]
        inverse = np.linalg.inv(full[i:, i:])
        work[i:] -= (work[i] - out[i]) / inverse[0, 0] * inverse[0]
    return out.reshape(matrix.shape)


def test_the_first_pass_is_the_optimal_correction_of_the_kronecker_product() -> None:
    matrix, a, b = problem(10, 32)
    work = _Work(matrix, "q4_0", a, factor(a, 0.0), b)
    work.down = factor(b, 0.0).contiguous()
    plain = quantize(matrix, "q4_0")
    found = dequantize(work._codes(plain, first=True), "q4_0", matrix.shape)
    want = by_hand(matrix, a.double().numpy(), b.double().numpy(), take_apart(plain, "q4_0").scale)
    assert np.isclose(found, want, atol=1e-4).mean() > 0.97


@pytest.mark.parametrize("type", ["q4_0", "q5_1", "iq4_nl", "q4_k"])
def test_sweeps_end_where_no_single_code_can_do_better(type: str) -> None:
    matrix, a, b = problem(12, 256 if type == "q4_k" else 64)
    work = _Work(matrix, type, a, factor(a), b)
    assert work.coupling is not None
    packed = quantize(matrix, type)
    losses = [lost(packed, type, matrix, work.metric, work.coupling)]
    for _ in range(12):
        packed = work._codes(packed, first=False)
        losses.append(lost(packed, type, matrix, work.metric, work.coupling))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.7 * losses[0]
    draw = np.random.default_rng(3)
    for row, column in zip(draw.integers(0, 12, 40), draw.integers(0, matrix.shape[1], 40), strict=True):
        for move in (-1, 1):
            parts = take_apart(packed, type)
            code = int(parts.codes[row, column]) + move
            if 0 <= code <= work.layout.top:
                parts.codes[row, column] = code
                other = lost(put_together(parts), type, matrix, work.metric, work.coupling)
                assert other >= losses[-1] * (1 - 1e-4)


@pytest.mark.parametrize("type", ["q4_0", "q5_1", "iq4_nl", "q4_k"])
def test_fitting_scales_only_helps(type: str) -> None:
    matrix, a, b = problem(96, 256 if type == "q4_k" else 64)
    work = _Work(matrix, type, a, factor(a), b)
    before = quantize(matrix, type)
    after = work._scales(before)
    old, new = (lost(p, type, matrix, work.metric, work.coupling) for p in (before, after))
    assert new < (1.0 if type == "q4_k" else 0.97) * old
    halfway = put_together(_between(take_apart(before, type), take_apart(after, type), 0.5))
    middle = (dequantize(before, type, matrix.shape) + dequantize(after, type, matrix.shape)) / 2
    np.testing.assert_allclose(dequantize(halfway, type, matrix.shape), middle, atol=5e-3)


@pytest.mark.parametrize("type", ["q4_0", "q5_1", "iq4_nl", "q4_k"])
def test_it_loses_less_than_feedback_over_columns(type: str) -> None:
    matrix, a, b = problem(128, 256)
    upper = factor(a)
    columns = lost(round_with_feedback(matrix, type, a, upper), type, matrix, a, b)
    both = lost(round_both_ways(matrix, type, a, upper, b), type, matrix, a, b)
    assert both < 0.8 * columns


def test_rows_that_are_not_coupled_are_rounded_as_feedback_does() -> None:
    matrix, a, _ = problem(16, 64)
    upper, apart = factor(a), torch.eye(16)
    want = lost(round_with_feedback(matrix, "q4_0", a, upper, sweeps=2), "q4_0", matrix, a, apart)
    for rows in (None, 0.1 * apart):
        found = lost(round_both_ways(matrix, "q4_0", a, upper, rows, sweeps=2), "q4_0", matrix, a, apart)
        assert found == pytest.approx(want, rel=0.03)


def test_what_never_receives_anything_is_still_rounded() -> None:
    matrix, a, b = problem(8, 64)
    packed = round_both_ways(matrix, "q4_0", torch.zeros_like(a), factor(torch.zeros_like(a)), b)
    error = dequantize(packed, "q4_0", matrix.shape) - matrix
    assert np.abs(error).max() < 0.5
    assert bool((_damped(b).diagonal() > b.diagonal()).all())
