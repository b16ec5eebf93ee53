"""APOLLO: the gradient itself, each channel scaled as Adam would scale it in a small random space."""

from __future__ import annotations

import math

import torch

from fivefold.training.adamw import BETAS, AdamW, direction
from fivefold.training.optimizer import Optimizer, slabs, subtract
from fivefold.training.optimizers import subspace
from fivefold.training.precision import Dice, State

GROWTH = 1.01
"""The length of an update may grow by this factor from one step to the next."""
TINY = 1e-30


class Apollo(Optimizer):
    """Matrices whose shorter side exceeds `rank`; all others are treated by plain AdamW."""

    def __init__(
        self, *, rank: int, every: int, scale: float, by_channel: bool, betas: tuple[float, float] = BETAS,
        eps: float = 1e-8,
    ) -> None:
        self.rank, self.every, self.scale, self.by_channel = rank, every, scale, by_channel
        self.betas, self.eps = betas, eps
        self.plain = AdamW(betas=betas, eps=eps)

    def projected(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and min(shape) > self.rank

    def state(self, parameter: torch.Tensor) -> State:
        shape = tuple(parameter.shape)
        if not self.projected(shape):
            return self.plain.state(parameter)
        low = subspace.low_shape(shape, self.rank)
        sizes: dict[str, tuple[int, ...]] = {"mean": low, "square": low, "length": (1,)}
        return {name: torch.zeros(size, device=parameter.device) for name, size in sizes.items()}

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        if not self.projected(shape):
            return self.plain.state_bytes(shape)
        return 4 * (2 * self.rank * max(shape) + 1)

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: State, beside: State, rate: float, step: int,
        dice: Dice | None,
    ) -> None:
        shape = tuple(weight.shape)
        if not self.projected(shape):
            self.plain.update(weight, gradient, state, beside, rate, step, dice)
            return
        basis = subspace.random(shape, self.rank, (step - 1) // self.every).to(gradient.device)
        factors = self.factors(subspace.seen(gradient, basis), state, step, subspace.tall(shape))
        factors.mul_(self.scale * math.sqrt(min(shape) / self.rank))
        squares = sum(float(self._scaled(gradient, factors, part).square_().sum()) for part in slabs(shape))
        length, before = math.sqrt(squares), float(state["length"])
        limit = min(1.0, GROWTH * before / length) if before > 0 and length > 0 else 1.0
        state["length"].fill_(length * limit)
        for part in slabs(shape):
            change = self._scaled(gradient, factors, part).mul_(rate * limit)
            subtract(weight[part], change, {name: b[part] for name, b in beside.items()}, dice)

    def factors(self, low: torch.Tensor, state: State, step: int, is_tall: bool) -> torch.Tensor:
        """By how much Adam lengthens each channel in the small space: (rows, 1), (columns,) or one number."""
        adam = direction(low, state["mean"], state["square"], step, self.betas, self.eps)
        if not self.by_channel:
            return (adam.norm() / low.norm().clamp_min(TINY)).view(1)
        along = 1 if is_tall else 0
        ratio = adam.norm(dim=along) / low.norm(dim=along).clamp_min(TINY)
        return ratio[:, None] if is_tall else ratio

    def _scaled(self, gradient: torch.Tensor, factors: torch.Tensor, part: slice) -> torch.Tensor:
        return gradient[part].float() * (factors[part] if factors.ndim == 2 else factors)
