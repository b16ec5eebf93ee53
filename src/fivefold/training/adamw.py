"""AdamW, one parameter at a time, so that it can run inside the backward pass and a gradient is gone once used.

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    w <- w - rate * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay * w)

State: m and v, in float32 (8 bytes per weight) or bfloat16 (4). In bfloat16 an average whose new part is below 1/512 of
it would stand still: b2 = 0.999 does, b2 <= 0.99 does not, hence the default 0.98.

Source: Loshchilov & Hutter, arXiv 1711.05101.
"""

from __future__ import annotations

import math

import torch

from fivefold.training.optimizer import Optimizer, pieces
from fivefold.training.precision import Dice, State, read, write

BETAS = (0.9, 0.98)


def direction(
    gradient: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, step: int, betas: tuple[float, float],
    eps: float,
) -> torch.Tensor:
    """What Adam moves against, a new tensor; the float32 averages take the float32 gradient in."""
    first, second = betas
    mean.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root = square.sqrt().div_(math.sqrt(1 - second**step)).add_(eps)
    return torch.div(mean, root, out=root).div_(1 - first**step)


class AdamW(Optimizer):
    def __init__(
        self, *, betas: tuple[float, float] = BETAS, eps: float = 1e-8, decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.betas, self.eps, self.decay, self.dtype = betas, eps, decay, dtype

    def state(self, parameter: torch.Tensor) -> State:
        return {name: torch.zeros_like(parameter, dtype=self.dtype) for name in ("mean", "square")}

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        return 2 * self.dtype.itemsize * math.prod(shape)

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: State, beside: State, rate: float, step: int,
        dice: Dice | None,
    ) -> None:
        for w, g, (m, v), near in pieces(weight, gradient, (state["mean"], state["square"]), beside):
            mean, square, value = m.float(), v.float(), read(w, near)
            move = direction(g.float(), mean, square, step, self.betas, self.eps)
            if self.dtype != torch.float32:
                m.copy_(mean)
                v.copy_(square)
            if self.decay:
                value.mul_(1 - rate * self.decay)
            write(w, value.sub_(move, alpha=rate), near, dice)
