"""Hard-concrete gates: random numbers in [0, 1] that are exactly 0 or 1 with a probability one can differentiate.

    s = sigmoid(a + log u - log(1 - u))    u uniform on (0, 1)    z = min(1, max(0, s (R - L) + L))     L < 0, R > 1
    P(z = 0) = sigmoid(log(-L / R) - a)                           the gate without noise: u = 1/2

A linear layer with a gated difference computes with W + z * w. Nothing of it is kept for the backward pass but the
layer's input: the draw is a function of (seed, step, layer), so gates and matrix are made again there, one layer at a
time.

Sources: Louizos et al., arXiv 1712.01312, with the temperature 1 and the L, R of Guo et al., arXiv 2012.07463.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from fivefold.training.lean import _MARK

LEFT, RIGHT = -1.5, 1.5
SHIFT = math.log(-LEFT / RIGHT)


def gate(openness: torch.Tensor, uniform: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(z, dz / d openness); without noise where `uniform` is None."""
    noisy = openness if uniform is None else openness + torch.logit(uniform, eps=1e-7)
    s = torch.sigmoid(noisy)
    wide = s * (RIGHT - LEFT) + LEFT
    return wide.clamp(0, 1), (RIGHT - LEFT) * s * (1 - s) * ((wide > 0) & (wide < 1))


class _Open(torch.autograd.Function):
    @staticmethod
    def forward(ctx, openness):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(openness)
        return torch.sigmoid(openness - SHIFT).sum()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        p = torch.sigmoid(ctx.saved_tensors[0] - SHIFT)
        return (p * (1 - p)).mul_(grad)


def expected_open(openness: torch.Tensor) -> torch.Tensor:
    """The expected number of gates that are not 0, a differentiable scalar: the L0 penalty."""
    out: torch.Tensor = _Open.apply(openness)
    return out


@dataclass(eq=False)
class Draws:
    """What all gates of a model share. `step` (0-based) and `fixed` (1: every gate is 1) are tensors, to be restored in
    place."""

    seed: int
    step: torch.Tensor
    fixed: torch.Tensor

    @classmethod
    def of(cls, seed: int) -> Draws:
        return cls(seed, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64))

    def uniform(self, shape: torch.Size, layer: int, device: torch.device) -> torch.Tensor:
        start = np.random.SeedSequence([self.seed, int(self.step), layer]).generate_state(1, np.uint64)[0]
        return torch.rand(shape, generator=torch.Generator().manual_seed(int(start))).to(device)

    def gates(self, part: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(z, dz / d openness) of a layer now."""
        if self.fixed:
            return torch.ones_like(part.openness), torch.zeros_like(part.openness)
        noise = self.uniform(part.openness.shape, part.layer, part.openness.device) if part.training else None
        return gate(part.openness.detach(), noise)


class _Changed(torch.autograd.Function):
    """y = x (W + z * w)' + b."""

    @staticmethod
    def forward(ctx, x, change, openness, part):  # type: ignore[no-untyped-def]
        ctx.again, sources = getattr(x, _MARK, (None, ()))
        ctx.save_for_backward(x if ctx.again is None else None, *sources)
        ctx.part, ctx.shape = part, x.shape
        z, _ = part.draws.gates(part)
        return F.linear(x, _matrix(part, z), part.bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        part = ctx.part
        flat = grad.reshape(-1, grad.shape[-1])
        z, slope = part.draws.gates(part)
        of_x = (flat @ _matrix(part, z)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        x, *sources = ctx.saved_tensors
        x = (x if ctx.again is None else ctx.again(*sources)).reshape(-1, ctx.shape[-1])
        of_matrix = _turned(part, (flat.T @ x).float())
        of_openness = None if part.draws.fixed else slope.mul_(of_matrix).mul_(part.change.detach())
        return of_x, z.mul_(of_matrix), of_openness, None


def _turned(part: Any, matrix: torch.Tensor) -> torch.Tensor:
    """Between (outputs, inputs) and the way the layer holds its weight."""
    return matrix if isinstance(part, torch.nn.Linear) else matrix.T


def _matrix(part: Any, z: torch.Tensor) -> torch.Tensor:
    """W + z * w as (outputs, inputs)."""
    return _turned(part, torch.addcmul(part.weight.float(), z, part.change.detach()).to(part.weight.dtype))


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _Changed.apply(x, self.change, self.openness, self)
    return out


def _gated(kind: Any) -> Any:
    return type(f"Gated{kind.__name__}", (kind,), {"forward": _forward})


def install(part: Any, layer: int, draws: Draws, openness: float) -> None:
    """Give a linear layer a gated difference: `change` (0) and `openness`, float32, shaped like its weight."""
    part.change = torch.nn.Parameter(torch.zeros_like(part.weight, dtype=torch.float32))
    part.openness = torch.nn.Parameter(torch.full_like(part.weight, openness, dtype=torch.float32))
    part.layer, part.draws = layer, draws
    part.__class__ = _gated(type(part))
