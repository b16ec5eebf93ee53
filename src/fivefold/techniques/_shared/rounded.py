"""A packed matrix as a differentiable function of what its bytes can still change.

    W = d S v(c) + m B

Three things are trained: the scale of each block, d = d0 (1 + e); the minimum, m = m0 + f |d0|; and, if wanted, the
codes, through a real-valued u per element with c = round(u). The gradients of e and f are exact. Rounding has none,
so u receives that of the unrounded value (straight-through); an element changes its code only when u is pushed over
the border of its step. What is learnt is what is written: the result is packed from the same d, m and c.

Sources: EfficientQAT (Chen et al., arXiv 2407.11062) for training scales; straight-through estimation (Bengio et al.,
arXiv 1308.3432).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fivefold.techniques._shared.blocks import LEVELS, SUB, Parts, layouts, put_together, take_apart

INSIDE = 0.49
"""At most this far from its code's centre does u start, so that the first W is the packed one."""


class Rounded(nn.Module):
    """One packed matrix; `forward()` is its float32 value (rows, columns) in the exported order."""

    def __init__(self, data: NDArray[np.uint8], type: str, original: NDArray[np.float32] | None) -> None:
        """With `original`, the unrounded matrix, the codes are trained too."""
        super().__init__()
        self.parts = take_apart(data, type)
        self.layout = layouts()[type]
        parts = self.parts
        self.scale0 = torch.from_numpy(parts.scale)
        self.scale = nn.Parameter(torch.zeros_like(self.scale0))
        self.steps = torch.from_numpy(parts.steps)
        self.minimum: nn.Parameter | None = None
        if parts.minimum is not None and parts.lows is not None:
            self.minimum0, self.lows = torch.from_numpy(parts.minimum), torch.from_numpy(parts.lows)
            self.minimum = nn.Parameter(torch.zeros_like(self.minimum0))
        self.u: nn.Parameter | None = None
        if original is not None:
            self.u = nn.Parameter(self._start(torch.from_numpy(original)))
        else:
            self.values = self._values(torch.from_numpy(parts.codes))

    def _start(self, original: torch.Tensor) -> torch.Tensor:
        """Where in its step each original weight lies, in units of codes."""
        codes = torch.from_numpy(self.parts.codes).float()
        unit = _times(torch.ones_like(codes), _per_sub(self.steps, self.scale0))
        offset = torch.zeros_like(codes)
        if self.minimum is not None:
            offset = _times(torch.ones_like(codes), _per_sub(self.lows, self.minimum0))
        missing = (original - offset) / torch.where(unit == 0, torch.inf, unit) - self._values(codes.to(torch.uint8))
        return codes + (missing / self._slope(codes)).clamp(-INSIDE, INSIDE)

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        if self.layout.table:
            return torch.tensor(LEVELS, dtype=torch.float32)[codes.long()]
        return codes.float() - self.layout.zero

    def _slope(self, codes: torch.Tensor) -> torch.Tensor | float:
        """Value per code step."""
        if not self.layout.table:
            return 1.0
        levels = torch.tensor(LEVELS, dtype=torch.float32)
        middle = torch.gradient(levels)[0]
        return middle[codes.long()]

    def codes(self) -> torch.Tensor:
        assert self.u is not None
        return self.u.detach().round().clamp_(0, self.layout.top)

    def forward(self) -> torch.Tensor:
        scale = self.scale0 * (1 + self.scale)
        if self.u is None:
            out = _times(self.values, _per_sub(self.steps, scale))
        else:
            codes = self.codes()
            values = self._values(codes.to(torch.uint8) if self.layout.table else codes)
            out = _Through.apply(self.u, values, _per_sub(self.steps, scale), self._slope(codes))
        if self.minimum is not None:
            minimum = self.minimum0 + self.minimum * self.scale0.abs()
            out = (out.view(*self.lows.shape, SUB) + _per_sub(self.lows, minimum)[:, :, None]).view_as(out)
        return out

    def packed(self) -> NDArray[np.uint8]:
        """Bytes with what was learnt."""
        parts = self.parts
        codes = parts.codes if self.u is None else self.codes().to(torch.uint8).numpy()
        with torch.no_grad():
            scale = (self.scale0 * (1 + self.scale)).numpy()
            minimum = parts.minimum
            if self.minimum is not None:
                minimum = (self.minimum0 + self.minimum * self.scale0.abs()).numpy()
        return put_together(Parts(type=parts.type, codes=codes, scale=scale, minimum=minimum, steps=parts.steps,
                                  lows=parts.lows, data=parts.data))


def _per_sub(steps: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(rows, columns / 16) times (rows, blocks), the latter repeated within its block."""
    rows, blocks = scale.shape
    return (steps.view(rows, blocks, -1) * scale[:, :, None]).view_as(steps)


def _times(values: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """(rows, columns) times (rows, columns / 16), the latter repeated."""
    return (values.view(*unit.shape, SUB) * unit[:, :, None]).view_as(values)


class _Through(torch.autograd.Function):
    """values * unit forward; backward as if values moved with u at `slope`."""

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, values: torch.Tensor, unit: torch.Tensor, slope: Any) -> torch.Tensor:
        ctx.save_for_backward(values, unit)
        ctx.slope = slope
        return _times(values, unit)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, unit = ctx.saved_tensors
        shaped = grad.view(*unit.shape, SUB)
        return _times(grad * ctx.slope, unit), None, (shaped * values.view_as(shaped)).sum(-1), None
