"""BAdam: Adam on one block of layers at a time; the other blocks rest, without gradient and state."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import torch

from fivefold.training.adamw import BETAS, AdamW
from fivefold.training.optimizer import Optimizer, pieces, seeded
from fivefold.training.precision import Dice, State, carry, read, write

OUTSIDE = -1
_LAYER = re.compile(r"(?:^|\.)(?:layer)?(\d+)\.")


def block_of(name: str) -> int:
    """The number of the layer a parameter belongs to; all that lies outside the layers is one block more."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else OUTSIDE


class BAdam(Optimizer):
    """`halves`: the lower halves of bfloat16 weights are kept of the active block, as a part of its state."""

    def __init__(
        self, *, every: int, order: Literal["random", "ascending"], seed: int = 0, halves: bool = False,
        betas: tuple[float, float] = BETAS, eps: float = 1e-8,
    ) -> None:
        self.every, self.order, self.seed, self.halves = every, order, seed, halves
        self.adam = AdamW(betas=betas, eps=eps)

    def state(self, parameter: torch.Tensor) -> State:
        return self.adam.state(parameter) | (carry(parameter, "split") if self.halves else {})

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        return self.adam.state_bytes(shape) + (2 * math.prod(shape) if self.halves else 0)

    def at_once(self, shapes: Mapping[str, tuple[int, ...]], steps: int = 0) -> Mapping[str, tuple[int, ...]]:
        """Of the blocks that come within `steps`, the one with the largest state."""
        seen = {block_of(n) for n in shapes}
        if 0 < steps <= self.every * len(seen):
            seen = {self.active(step, shapes) for step in range(1, steps + 1, self.every)}
        blocks = [{n: s for n, s in shapes.items() if block_of(n) == b} for b in seen]
        return max(blocks, key=lambda block: sum(self.state_bytes(s) for s in block.values()), default={})

    def active(self, step: int, names: Iterable[str]) -> int:
        """The block that 1-based `step` trains. Each cycle visits every block once."""
        blocks = sorted({block_of(name) for name in names})
        cycle, place = divmod((step - 1) // self.every, len(blocks))
        if self.order == "random":
            return blocks[int(np.random.default_rng([self.seed, cycle]).permutation(len(blocks))[place])]
        return blocks[place]

    def begin(
        self, step: int, parameters: Mapping[str, torch.nn.Parameter], states: dict[str, State]
    ) -> None:
        chosen = self.active(step, parameters)
        for name, parameter in parameters.items():
            parameter.requires_grad_(block_of(name) == chosen)
        if self._since(step) == 1:
            self._leave(step, parameters, states)
            states.clear()

    def _leave(self, step: int, parameters: Mapping[str, torch.nn.Parameter], states: Mapping[str, State]) -> None:
        """A block at rest has no lower halves: its weights are rounded up with the probability of what is lost."""
        dice = Dice(int(seeded(self.seed, step).initial_seed() >> 1))
        for name, state in states.items() if self.halves else ():
            weight = parameters[name].data
            for w, _, _, near in pieces(weight, weight, (), {"lower": state["lower"]}):
                write(w, read(w, near), {}, dice)

    def _since(self, step: int) -> int:
        return (step - 1) % self.every + 1

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: State, beside: State, rate: float, step: int,
        dice: Dice | None,
    ) -> None:
        near = {"lower": state["lower"]} if self.halves else beside
        self.adam.update(weight, gradient, state, near, rate, self._since(step), dice)
