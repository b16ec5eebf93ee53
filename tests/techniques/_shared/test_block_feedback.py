"""Rounding with feedback against the textbook correction, and against rounding each block alone."""

import numpy as np
import torch

from fivefold.engines._quantize import dequantize, quantize
from fivefold.techniques._shared.block_feedback import factor, importance, round_with_feedback


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


def test_two_blocks_follow_the_optimal_correction() -> None:
    matrix, hessian = problem(64)
    packed = round_with_feedback(matrix, "q4_0", hessian, factor(hessian, 0.0))
    weights, half = importance(hessian), packed.shape[1] // 2
    first = dequantize(quantize(matrix[:, :32], "q4_0", weights[:32]), "q4_0", (16, 32))
    gain = (hessian[:32, 32:] @ torch.linalg.inv(hessian[32:, 32:])).numpy()
    wanted = matrix[:, 32:] - (first - matrix[:, :32]) @ gain
    np.testing.assert_allclose(dequantize(packed[:, :half], "q4_0", (16, 32)), first)
    second = dequantize(quantize(wanted.astype(np.float32), "q4_0", weights[32:]), "q4_0", (16, 32))
    assert np.mean(np.isclose(dequantize(packed[:, half:], "q4_0", (16, 32)), second, atol=1e-3)) > 0.99


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
