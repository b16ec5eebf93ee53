"""MeZO: a gradient estimated from two forward passes, with noise that is drawn again instead of kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from fivefold.training.optimizer import Optimizer, pieces, seeded
from fivefold.training.precision import State, read, write

BITS = 24
LARGEST = 9.0
"""No number drawn as a float32 from the normal distribution here is larger."""


class MeZO(Optimizer):
    """All sums are exact, because weights and noise are multiples of one step per tensor:

        step = 2^(e - 24),   |w| + 9 eps < 2^e

    A weight so comes back bit for bit from w + z, w - z, w; it is rounded to the step once, by less than a float32
    of the tensor's largest weight resolves.
    """

    needs_gradients = False

    def __init__(self, *, eps: float, seed: int = 0) -> None:
        self.eps, self.seed = eps, seed

    def without_gradients(
        self, loss: Callable[[], float], parameters: Mapping[str, torch.nn.Parameter], beside: Mapping[str, State],
        rates: Mapping[str, float], step: int,
    ) -> float:
        """The update is along the noise, by rate x (loss above - loss below) / 2 eps."""
        grids = {name: self.grid(p.data) for name, p in parameters.items()}

        def move(times: float, along: float = 0.0) -> None:
            """w <- w + times x noise - rate x along x z."""
            for index, (name, p) in enumerate(parameters.items()):
                self._move(p.data, beside[name], seeded(self.seed, step, index), grids[name], times,
                           rates[name] * along)

        move(1)
        above = loss()
        move(-2)
        below = loss()
        move(1, (above - below) / (2 * self.eps))
        return (above + below) / 2

    def grid(self, weight: torch.Tensor) -> float:
        low, high = (float(end) for end in weight.aminmax())
        largest = 1.01 * max(-low, high) + LARGEST * self.eps
        return math.ldexp(1.0, math.frexp(largest)[1] - BITS)

    def _move(
        self, weight: torch.Tensor, beside: State, draw: torch.Generator, grid: float, times: float, along: float
    ) -> None:
        for w, z, near in self._noisy(weight, beside, draw):
            noise = (z * (self.eps / grid)).round_()
            value = (read(w, near) / grid).round_().add_(noise, alpha=times).mul_(grid)
            if along:
                value.sub_(z, alpha=along)
            write(w, value, near, None)

    def _noisy(
        self, weight: torch.Tensor, beside: State, draw: torch.Generator
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, State]]:
        for w, _, _, near in pieces(weight, weight, (), beside):
            yield w, torch.randn(len(w), generator=draw).to(w.device), near
