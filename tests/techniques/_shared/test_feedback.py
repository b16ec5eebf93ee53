"""Rounding with feedback against the textbook correction, and against rounding each block alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fivefold.engines._quantize import dequantize, quantize
from fivefold.techniques._shared import feedback
from fivefold.techniques._shared.blocks import layouts, take_apart
from fivefold.techniques._shared.feedback import _fit_codes, _fit_scales, factor, importance, round_with_feedback
from fivefold.techniques._shared.gguf_types import block


def problem(columns: int = 128) -> tuple[np.ndarray, torch.Tensor]:
    torch.manual_seed(0)
    mixing = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(2000, columns) @ mixing
    return torch.randn(16, columns).numpy(), inputs.T @ inputs / 2000


def test_factor_is_the_inverse() -> None:
    _, hessian = problem()
    upper = factor(hessian, 0.0).double()
    scaled = hessian.double() / hessian.diagonal().mean()
    torch.testing.assert_close(upper.T @ upper @ scaled, torch.eye(128, dtype=torch.float64), atol=1e-3, rtol=0)
    assert torch.equal(upper, upper.triu())


def by_hand(matrix: np.ndarray, hessian: torch.Tensor) -> np.ndarray:
    """Optimal Brain Quantization in textbook form: after each column the rest moves by -e H^-1_jk / H^-1_jj, with the
    inverse of the columns that are left computed anew each time; q4_0 scales from ggml for the moved block."""
    work, full = matrix.astype(np.float64), hessian.double().numpy()
    weights, out = importance(hessian), np.zeros_like(work)
    for start in range(0, work.shape[1], 32):
        block = np.ascontiguousarray(work[:, start : start + 32], np.float32)
        packed = quantize(block, "q4_0", weights[start : start + 32])
        scale = packed[:, :2].copy().view(np.float16).astype(np.float64)[:, 0]
        for j in range(start, start + 32):
            safe = np.where(scale == 0, 1, scale)
            out[:, j] = np.clip(np.round(work[:, j] / safe), -8, 7) * scale
            inverse = np.linalg.inv(full[j:, j:])
            work[:, j:] -= np.outer((work[:, j] - out[:, j]) / inverse[0, 0], inverse[0])
    return out


def test_columns_follow_the_optimal_correction() -> None:
    matrix, hessian = problem(64)
    packed = round_with_feedback(matrix, "q4_0", hessian, factor(hessian, 0.0), sweeps=0)
    agree = np.isclose(dequantize(packed, "q4_0", matrix.shape), by_hand(matrix, hessian), atol=1e-4)
    assert agree.mean() > 0.97  # a tie that falls the other way in float32 moves the columns after it


@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "iq4_nl", "q4_k"])
def test_scales_are_those_of_least_squares(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "RIDGE", 0.0)
    matrix, hessian = problem(512 if kind == "q4_k" else 64)
    packed = quantize(matrix, kind)
    parts = take_apart(packed, kind)
    per, columns = block(kind), matrix.shape[1]
    root = np.linalg.cholesky(hessian.double().numpy() + 1e-9 * np.eye(columns))
    fitted = take_apart(_fit_scales(torch.tensor(matrix), packed, kind, hessian), kind)
    for row in range(4):
        parts.scale[:] = 1
        zero = np.zeros_like(parts.scale)
        one = replace(parts, minimum=None if parts.minimum is None else zero).matrix()[row]
        shapes = [np.where(np.arange(columns) // per == b, one, 0) for b in range(columns // per)]
        if parts.minimum is not None:
            low = replace(parts, scale=zero, minimum=zero + 1).matrix()[row]
            shapes += [np.where(np.arange(columns) // per == b, low, 0) for b in range(columns // per)]
        best = np.linalg.lstsq((np.array(shapes) @ root).T, matrix[row] @ root, rcond=None)[0]
        found = fitted.scale[row] if fitted.minimum is None else np.r_[fitted.scale[row], fitted.minimum[row]]
        np.testing.assert_allclose(found, best, rtol=5e-3, atol=2e-3 * np.abs(best).max())


@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "iq4_nl", "q8_0"])
def test_no_single_code_would_do_better_after_a_sweep_has_settled(kind: str) -> None:
    matrix, hessian = problem(64)
    packed, weight = quantize(matrix, kind), hessian.double().numpy()
    for _ in range(30):
        packed = _fit_codes(torch.tensor(matrix), packed, kind, hessian)

    def losses(value: np.ndarray) -> np.ndarray:
        error = value.astype(np.float64) - matrix
        return ((error @ weight) * error).sum(1)

    parts = take_apart(packed, kind)
    settled = losses(parts.matrix())
    for column in (0, 31, 32, 63):
        for step in (-1, 1):
            moved = parts.codes.copy()
            moved[:, column] = np.clip(moved[:, column].astype(int) + step, 0, layouts()[kind].top)
            assert (losses(replace(parts, codes=moved).matrix()) >= settled * (1 - 1e-3)).all()


def test_each_sweep_lowers_the_error() -> None:
    matrix, hessian = problem()
    upper, weight = factor(hessian, 0.01), hessian.numpy()
    errors = [dequantize(round_with_feedback(matrix, "q5_0", hessian, upper, sweeps=n), "q5_0", matrix.shape) - matrix
              for n in (0, 1, 3)]
    first, second, third = (float(((e @ weight) * e).sum()) for e in errors)
    assert first > second > third


def test_feedback_lowers_the_weighted_error() -> None:
    matrix, hessian = problem()

    def loss(data: np.ndarray) -> float:
        error = dequantize(data, "q4_0", matrix.shape) - matrix
        return float(((error @ hessian.numpy()) * error).sum())

    alone = loss(quantize(matrix, "q4_0", importance(hessian)))
    assert loss(round_with_feedback(matrix, "q4_0", hessian, factor(hessian, 0.01))) < 0.85 * alone


def test_a_matrix_that_receives_nothing_is_still_rounded() -> None:
    matrix, _ = problem()
    empty = torch.zeros(128, 128)
    data = round_with_feedback(matrix, "q8_0", empty, factor(empty, 0.01))
    np.testing.assert_allclose(dequantize(data, "q8_0", matrix.shape), matrix, atol=0.03)
