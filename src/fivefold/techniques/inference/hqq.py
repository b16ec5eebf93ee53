"""HQQ: offsets chosen so that most weights are met closely and the few outliers take the error; no text is needed.

Rounding error e = w - w' of a group is judged by sum |e|^p with p < 1, which forgives outliers, instead of squares.
That is not smooth, so it is split in two (half-quadratic): sum |e|^p + beta / 2 |w - w' - e|^2 is lowered in turns,

    e  <-  shrink(w - w', beta)      shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta)
    z  <-  mean over the group of (w - e - s q)

with the codes q rounded anew and beta growing by a factor each time. s stays (max - min) / (2^bits - 1). Each group
keeps the offset that was best by sum |e|^p, so it never ends worse than it began, at plain rounding.

Lowers what `rtn` lowers. As fast as rounding and without calibration data, for a part of what gptq gains; it needs the
offsets, so there is no symmetric grid. At 8 bits nothing is left to gain; where rows have no outliers, little.

Source: Badri, Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023 (mobiusml.github.io/hqq_blog).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fivefold.model import Model
from fivefold.space import Fixed, Range
from fivefold.techniques._shared.rounding import Rounding

if TYPE_CHECKING:
    from torch import Tensor

    from fivefold.techniques._shared.grids import Codes

BETA, GROWTH = 10.0, 1.01


@dataclass(frozen=True, kw_only=True)
class Hqq(Rounding):
    headline = "Llama-2-70B in under 5 minutes without data, over 50x faster than GPTQ"

    norm: Annotated[float, Range(0.1, 1.0), Fixed()] = 0.7
    """The power p of the errors."""
    rounds: Annotated[int, Range(1, 1000), Fixed()] = 20
    """How often e and z take turns."""
    symmetric = False

    def effort(self, model: Model) -> float:
        return 5_000.0 * model.blueprint.parameters

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.targets import matrices_of

        target = self.target
        shapes = target.check(model)
        solved = ((name, self.solve(weight)) for name, weight in matrices_of(model, shapes))
        return target.write(model, "hqq", solved).covered(f"hqq: {target.said(len(shapes), len(shapes))}")

    def solve(self, weight: Tensor) -> Codes:
        """`weight` is (rows, columns)."""
        import torch

        from fivefold.techniques._shared.grids import Codes, half, nearest, scales

        grid = self.target.grid
        rows, columns = weight.shape
        cells = weight.float().reshape(rows, -1, grid.size(columns))
        scale, offset = scales(cells, grid)
        assert offset is not None
        unit = torch.where(scale == 0, 1.0, scale)
        best = torch.full_like(scale, torch.inf)
        kept, beta = offset, BETA
        for turn in range(self.rounds + 1):
            near = nearest(cells, scale, half(offset), grid) * scale
            error = cells - near - half(offset)
            total = error.abs().pow_(self.norm).sum(-1, keepdim=True)
            kept = torch.where(total < best, half(offset), kept)
            best = torch.minimum(best, total)
            if turn < self.rounds:
                shrunk = self._shrink(error / unit, beta) * unit
                offset = (cells - shrunk - near).mean(-1, keepdim=True)
                beta *= GROWTH
        codes = nearest(cells, scale, kept, grid).to(torch.uint8).view(rows, columns)
        return Codes(grid=grid, codes=codes, scale=scale[..., 0], offset=kept[..., 0])

    def _shrink(self, x: Tensor, beta: float) -> Tensor:
        """`x` is in units of the scale, so that beta means the same in every group."""
        size = x.abs()
        return x.sign() * (size - size.clamp_min(1e-8).pow(self.norm - 1) / beta).clamp_min_(0)
