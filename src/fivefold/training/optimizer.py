"""What an optimiser is here: a state per parameter, and an update of one parameter by its gradient.

One parameter at a time is what lets the loop run the update as soon as a gradient is complete, in the middle of the
backward pass, and drop the gradient: the gradients of a whole model are then never held together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from fivefold.training.precision import LANES, Dice, State, read, write


class Optimizer:
    """The default does nothing before a step and needs gradients; see each method."""

    needs_gradients = True

    def state(self, parameter: torch.Tensor) -> State:
        """Fresh state of a parameter."""
        return {}

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes `state` takes for a parameter of this shape, by formula."""
        return 0

    def at_once(self, shapes: Mapping[str, tuple[int, ...]], steps: int = 0) -> Mapping[str, tuple[int, ...]]:
        """Those of `shapes` that have a gradient and a state at the same time, at most, within `steps` (0: any number):
        for the memory formula."""
        return shapes

    def begin(
        self, step: int, parameters: Mapping[str, torch.nn.Parameter], states: dict[str, State]
    ) -> None:
        """Before 1-based `step`: may choose, by requires_grad, which parameters it trains, and drop states."""

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: State, beside: State, rate: float, step: int,
        dice: Dice | None,
    ) -> None:
        """Change `weight` in place. `beside` is `precision.carry` of it; `step` counts from 1."""
        raise NotImplementedError

    def without_gradients(
        self, loss: Callable[[], float], parameters: Mapping[str, torch.nn.Parameter], beside: Mapping[str, State],
        rates: Mapping[str, float], step: int,
    ) -> float:
        """One step of an optimiser whose `needs_gradients` is False; returns the loss. Called without autograd."""
        raise NotImplementedError


def seeded(*numbers: int) -> torch.Generator:
    """A stream of random numbers of its own for every tuple of non-negative numbers."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def subtract(weight: torch.Tensor, change: torch.Tensor, beside: State, dice: Dice | None) -> None:
    """weight <- weight - change, `change` of its shape in float32."""
    for w, c, _, near in pieces(weight, change, (), beside):
        write(w, read(w, near).sub_(c), near, dice)


def slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a matrix treated at once: about LANES numbers."""
    rows = max(1, LANES // shape[1])
    yield from (slice(first, first + rows) for first in range(0, shape[0], rows))


def pieces(
    weight: torch.Tensor, gradient: torch.Tensor, states: Sequence[torch.Tensor], beside: State
) -> Iterator[tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...], State]]:
    """Flat views of LANES elements of a contiguous weight and of all that belongs to it."""
    flat, wide = weight.view(-1), gradient.reshape(-1)
    others, near = [s.view(-1) for s in states], {name: b.view(-1) for name, b in beside.items()}
    for first in range(0, flat.numel(), LANES):
        part = slice(first, first + LANES)
        yield flat[part], wide[part], tuple(o[part] for o in others), {name: b[part] for name, b in near.items()}
