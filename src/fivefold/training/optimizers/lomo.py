"""Plain gradient descent, and descent whose step is scaled by factored second moments: nearly no state."""

from __future__ import annotations

import math

import torch

from fivefold.training.optimizer import Optimizer, pieces, slabs
from fivefold.training.precision import Dice, State, read, write


class Lomo(Optimizer):
    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: State, beside: State, rate: float, step: int,
        dice: Dice | None,
    ) -> None:
        for w, g, _, near in pieces(weight, gradient, (), beside):
            write(w, read(w, near).sub_(g.float(), alpha=rate), near, dice)


class AdaLomo(Optimizer):
    """State: of a matrix the mean square of each row and each column, of a vector that of each number."""

    def __init__(self, *, power: float = 0.8, tiny: float = 1e-30, least: float = 1e-3, longest: float = 1.0) -> None:
        self.power, self.tiny, self.least, self.longest = power, tiny, least, longest

    def state(self, parameter: torch.Tensor) -> State:
        sizes = {"rows": parameter.shape[0], "columns": parameter.shape[1]} if parameter.ndim == 2 else {
            "square": parameter.numel()}
        return {name: torch.zeros(size, device=parameter.device) for name, size in sizes.items()}

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        return 4 * (sum(shape) if len(shape) == 2 else math.prod(shape))

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: State, beside: State, rate: float, step: int,
        dice: Dice | None,
    ) -> None:
        matrix = weight if weight.ndim == 2 else weight.view(1, -1)
        given = gradient.reshape(matrix.shape)
        near = {name: b.view(matrix.shape) for name, b in beside.items()}
        left, right = self._scales(given, state, 1 - step**-self.power)
        parts = list(slabs(matrix.shape))
        total = sum(float((given[p].float() * left[p] * right).square_().sum()) for p in parts)
        size = float(torch.linalg.vector_norm(weight, dtype=torch.float32)) / math.sqrt(weight.numel())
        length = math.sqrt(total / weight.numel())
        factor = rate * max(self.least, size) / max(1.0, length / self.longest)
        for part in parts:
            change = (given[part].float() * left[part]).mul_(right).view(-1)
            rows = {name: b[part] for name, b in near.items()}
            for w, c, _, here in pieces(matrix[part], change, (), rows):
                write(w, read(w, here).sub_(c, alpha=factor), here, dice)

    def _scales(self, given: torch.Tensor, state: State, keep: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, 1) and (columns,) or (1, columns): their product is 1 / root of the second moment."""
        if "square" in state:
            new = given.float().square().view(-1).add_(self.tiny)
            state["square"].lerp_(new, 1 - keep)
            return torch.ones(1, 1, device=given.device), state["square"].rsqrt()
        rows, columns = torch.empty_like(state["rows"]), torch.zeros_like(state["columns"])
        for part in slabs(given.shape):
            square = given[part].float().square().add_(self.tiny)
            rows[part] = square.mean(1)
            columns += square.sum(0)
        state["rows"].lerp_(rows, 1 - keep)
        state["columns"].lerp_(columns.div_(len(rows)), 1 - keep)
        return (state["rows"] / state["rows"].mean()).rsqrt_()[:, None], state["columns"].rsqrt()
