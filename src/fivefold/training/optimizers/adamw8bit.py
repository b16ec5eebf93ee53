"""AdamW whose averages are stored in 8 bits; the update itself is computed in float32, a piece at a time."""

from __future__ import annotations

import functools
import math

import torch

from fivefold.training.adamw import BETAS, AdamW, direction
from fivefold.training.optimizer import Optimizer
from fivefold.training.precision import LANES, Dice, State, read, write

BLOCK = 2048
SMALL = 4096
"""Below this many numbers (norms, biases) the averages stay in float32: they are few, and sensitive."""
DECADES = 7
TINY = 1e-37


def codebook(signed: bool) -> torch.Tensor:
    """The 256 values of a dynamic-tree code, rising, float32: a decade further from 1 takes half as many.

    Decade e (10^-6 .. 1) is cut evenly into 2^e parts (2^(e+1) without a sign), each standing for its middle; 0 and 1
    are added.
    """
    values = [0.0, 1.0]
    for decade in range(DECADES):
        parts = 2 ** (decade if signed else decade + 1)
        middles = [(0.1 + 0.9 * (k + 0.5) / parts) * 10.0 ** (decade + 1 - DECADES) for k in range(parts)]
        values += middles + [-m for m in middles if signed]
    return torch.tensor(sorted(values))


class Codes:
    """To and from the nearest of 256 values, by a table over the upper 16 bits of a float32 and one comparison."""

    def __init__(self, signed: bool) -> None:
        self.values = codebook(signed)
        between = (self.values[1:] + self.values[:-1]) / 2
        cells = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
        least = torch.where(cells < 0, cells | 0xFFFF, cells).view(torch.float32)
        self.first = torch.searchsorted(between, least.nan_to_num(0.0)).to(torch.uint8)
        self.above = torch.cat([between, torch.tensor([math.inf])])

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 codes of flat float32 values within [-1, 1]."""
        code = self.first.index_select(0, (x.view(torch.int32) >> 16).add_(1 << 15))
        return code.add_(x > self.above.index_select(0, code.int()))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.values.index_select(0, codes.int())


@functools.cache
def codes(signed: bool, device: str) -> Codes:
    made = Codes(signed)
    for name, tensor in vars(made).items():
        setattr(made, name, tensor.to(device))
    return made


class AdamW8bit(Optimizer):
    def __init__(self, *, betas: tuple[float, float] = BETAS, eps: float = 1e-8) -> None:
        self.betas, self.eps = betas, eps
        self.wide = AdamW(betas=betas, eps=eps)

    def state(self, parameter: torch.Tensor) -> State:
        count = parameter.numel()
        if count < SMALL:
            return self.wide.state(parameter)
        made: State = {}
        for name in ("mean", "square"):
            zero = int(codes(name == "mean", "cpu").encode(torch.zeros(1)))
            made[name] = torch.full((count,), zero, dtype=torch.uint8, device=parameter.device)
            made[f"{name}_scale"] = torch.zeros(-(-count // BLOCK), device=parameter.device)
        return made

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        count = math.prod(shape)
        return self.wide.state_bytes(shape) if count < SMALL else 2 * count + 8 * -(-count // BLOCK)

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: State, beside: State, rate: float, step: int,
        dice: Dice | None,
    ) -> None:
        if weight.numel() < SMALL:
            self.wide.update(weight, gradient, state, beside, rate, step, dice)
            return
        flat, given, near = weight.view(-1), gradient.reshape(-1), {n: b.view(-1) for n, b in beside.items()}
        device, whole = str(weight.device), len(flat) - len(flat) % BLOCK
        firsts = [*range(0, whole, LANES), *([whole] if whole < len(flat) else [])]
        for first, end in zip(firsts, [*firsts[1:], len(flat)], strict=True):
            part = slice(first, end)
            mean = _opened(state, "mean", part, codes(True, device))
            square = _opened(state, "square", part, codes(False, device))
            move = direction(given[part].float(), mean, square, step, self.betas, self.eps)
            _closed(state, "mean", part, codes(True, device), mean)
            _closed(state, "square", part, codes(False, device), square)
            here = {name: b[part] for name, b in near.items()}
            write(flat[part], read(flat[part], here).sub_(move, alpha=rate), here, dice)


def _blocks(part: slice) -> tuple[slice, tuple[int, int]]:
    """The blocks of a piece, and the shape of its numbers by block (the last one may be short)."""
    count = part.stop - part.start
    return slice(part.start // BLOCK, -(-part.stop // BLOCK)), (-(-count // BLOCK), min(BLOCK, count))


def _opened(state: State, name: str, part: slice, kind: Codes) -> torch.Tensor:
    blocks, shape = _blocks(part)
    values = kind.decode(state[name][part]).view(shape)
    return values.mul_(state[f"{name}_scale"][blocks, None]).view(-1)


def _closed(state: State, name: str, part: slice, kind: Codes, value: torch.Tensor) -> None:
    """A square that is not 0 is never stored as 0: nothing would then stand under the mean."""
    blocks, shape = _blocks(part)
    rows = value.view(shape)
    scale = rows.abs().amax(1)
    code = kind.encode((rows / scale.clamp_min(TINY)[:, None]).view(-1))
    if name == "square":
        code.clamp_(min=1)
    state[name][part] = code
    state[f"{name}_scale"][blocks] = scale
