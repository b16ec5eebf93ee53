"""GaLore: Adam on the gradient seen through its leading singular vectors."""

from __future__ import annotations

import torch

from fivefold.training.adamw import BETAS, AdamW, direction
from fivefold.training.optimizer import Optimizer, slabs, subtract
from fivefold.training.optimizers import subspace
from fivefold.training.precision import Dice, State


class GaLore(Optimizer):
    """Matrices whose shorter side exceeds `rank` are projected, all others treated by plain AdamW."""

    def __init__(
        self, *, rank: int, every: int, scale: float, betas: tuple[float, float] = BETAS, eps: float = 1e-8
    ) -> None:
        self.rank, self.every, self.scale, self.betas, self.eps = rank, every, scale, betas, eps
        self.plain = AdamW(betas=betas, eps=eps)

    def projected(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and min(shape) > self.rank

    def state(self, parameter: torch.Tensor) -> State:
        shape = tuple(parameter.shape)
        if not self.projected(shape):
            return self.plain.state(parameter)
        sizes = {"basis": (min(shape), self.rank), "mean": subspace.low_shape(shape, self.rank),
                 "square": subspace.low_shape(shape, self.rank)}
        return {name: torch.zeros(size, device=parameter.device) for name, size in sizes.items()}

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        if not self.projected(shape):
            return self.plain.state_bytes(shape)
        return 4 * self.rank * (min(shape) + 2 * max(shape))

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: State, beside: State, rate: float, step: int,
        dice: Dice | None,
    ) -> None:
        shape = tuple(weight.shape)
        if not self.projected(shape):
            self.plain.update(weight, gradient, state, beside, rate, step, dice)
            return
        basis = state["basis"]
        if (step - 1) % self.every == 0 or not basis.any():
            basis.copy_(subspace.leading(gradient, self.rank, step))
        low = direction(subspace.seen(gradient, basis), state["mean"], state["square"], step, self.betas, self.eps)
        low.mul_(rate * self.scale)
        for part in slabs(shape):
            change = subspace.back(low, basis, part, subspace.tall(shape))
            subtract(weight[part], change, {name: b[part] for name, b in beside.items()}, dice)
