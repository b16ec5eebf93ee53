"""Rounding with feedback: what one block of columns loses, the columns still to be rounded make up for.

The error of a row is D H D^T with H the columns' joint weight (see `sensitivity`). Once the columns b are fixed with
error D_b = Q_b - W_b, the best correction of the columns R not yet rounded is

    D_R = -D_b H_bR H_RR^-1  =  D_b U_bb^-1 U_bR     with  H^-1 = U^T U, U upper triangular

so each block is rounded, then the rest of the row is moved. Blocks here are those of the storage type (32 or 256
columns), handed to ggml's own quantizer: it chooses the scales for the *moved* weights, every type is possible, and the
bytes are those ggml would write. Correcting column by column inside a block as GPTQ does would gain a little more.

A little of H's mean diagonal is added (`damp`): with few calibration tokens H is noisy, and feedback fits the noise.

Source: GPTQ (Frantar et al., arXiv 2210.17323); Optimal Brain Surgeon.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fivefold.engines._quantize import dequantize, quantize
from fivefold.techniques._shared.gguf_types import block

Packed = NDArray[np.uint8]


def factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """U, upper triangular, with (H + damp mean(diag H) I)^-1 = U^T U; shape (columns, columns).

    A column that never receives anything is weighed like the damping alone.
    """
    mean = float(hessian.diagonal().mean()) or 1.0
    damped = hessian.double() / mean + damp * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def round_with_feedback(
    matrix: NDArray[np.float32], type: str, hessian: torch.Tensor, upper: torch.Tensor, threads: int = 2
) -> Packed:
    """(rows, columns) -> bytes of `type`, (rows, row bytes). `upper` is `factor(hessian, damp)`."""
    work = torch.tensor(matrix)
    rows, columns = work.shape
    step = block(type)
    weights = importance(hessian)
    out = []
    for start in range(0, columns, step):
        here = slice(start, start + step)
        packed = quantize(work[:, here].numpy(), type, weights[here], threads)
        out.append(packed)
        if start + step < columns:
            error = torch.from_numpy(dequantize(packed, type, (rows, step))) - work[:, here]
            moved = torch.linalg.solve_triangular(upper[here, here], error, upper=True, left=False)
            work[:, start + step:] += moved @ upper[here, start + step:]
    return np.concatenate(out, axis=1)


def importance(hessian: torch.Tensor) -> NDArray[np.float32]:
    """The diagonal of H as weights of columns, positive."""
    diagonal = hessian.diagonal().clamp_min(0)
    return (diagonal + 1e-6 * diagonal.mean() + 1e-30).numpy()
