"""Weights in bfloat16 that do not lose their updates.

bfloat16 has 8 bits of precision: an update below about 1/512 of a weight rounds away. AdamW moves a weight by about the
learning rate (1e-5 to 1e-3) while weights are about 0.02 to 0.1, so most updates of pure bfloat16 training are lost and
the loss stays high. Four ways to hold a trained weight, by what they keep beside the bfloat16 that is computed with:

    held         bytes  the update
    float32      4      exact; every pass casts the weight
    split        2 + 2  exact: the upper 16 bits of a float32 are the bfloat16 (rounded), the rest lie beside it
    kahan        2 + 2  the rounding error of the last addition is added to the next one: 16 bits of precision
    stochastic   2      rounded up with the probability of the lost part: right on average, noisy
    nearest      2      lost; here to be measured, not to be used

In `split`, w = (upper << 16) + lower as integers with a signed lower half, so the upper half is the nearest bfloat16
(ties away from zero) and the pair is the float32, bit for bit. Random bits come from one linear congruential stream per
lane (Numerical Recipes' constants), of which the upper 16 bits are used.

Sources: Gupta et al., arXiv 1502.02551 (stochastic rounding); Kahan, CACM 1965; Zamirai et al., arXiv 2010.06192.
"""

from __future__ import annotations

from typing import Literal

import torch

Held = Literal["float32", "split", "kahan", "stochastic", "nearest"]
State = dict[str, torch.Tensor]
LANES = 1 << 16
"""Elements treated at once: 256 kB of float32, so that the steps of one update meet in the cache."""


def carry(parameter: torch.Tensor, held: Held) -> State:
    """What lies beside a parameter held this way: {} or one tensor of its size. Raises ValueError for a wrong dtype."""
    wanted = torch.float32 if held == "float32" else torch.bfloat16
    if parameter.dtype != wanted:
        raise ValueError(f"a weight held as {held} is {wanted}, not {parameter.dtype}")
    if held == "split":
        return {"lower": torch.zeros(parameter.shape, dtype=torch.int16, device=parameter.device)}
    if held == "kahan":
        return {"lost": torch.zeros(parameter.shape, dtype=torch.bfloat16, device=parameter.device)}
    return {}


def carry_bytes(held: Held) -> int:
    """Bytes per weight that `carry` takes."""
    return 2 if held in ("split", "kahan") else 0


class Dice:
    """Random 16-bit numbers in lanes; `state` is its whole state, int32 (LANES,)."""

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu") -> None:
        draw = torch.Generator().manual_seed(seed)
        self.state = torch.randint(-(2**31), 2**31 - 1, (LANES,), generator=draw, dtype=torch.int32).to(device)

    def roll(self, count: int) -> torch.Tensor:
        """int32 (count,) uniform on [0, 65535], count <= LANES."""
        self.state.mul_(1664525).add_(1013904223)
        return (self.state[:count] >> 16) & 0xFFFF


def read(weight: torch.Tensor, beside: State) -> torch.Tensor:
    """The value in float32 of a piece of a weight; a copy, except of a float32 weight."""
    if weight.dtype == torch.float32:
        return weight
    if "lower" in beside:
        return (weight.view(torch.int16).to(torch.int32) << 16).add_(beside["lower"]).view(torch.float32)
    return weight.float().add_(beside["lost"]) if "lost" in beside else weight.float()


def write(weight: torch.Tensor, value: torch.Tensor, beside: State, dice: Dice | None) -> None:
    """Store float32 `value` (flat, and not needed afterwards) in place as `read` gave it."""
    if weight.dtype == torch.float32:
        if value.data_ptr() != weight.data_ptr():
            weight.copy_(value)
    elif "lower" in beside:
        bits = value.view(torch.int32)
        upper = (bits + 0x8000) >> 16
        weight.view(torch.int16).copy_(upper)
        beside["lower"].copy_(bits.sub_(upper << 16))
    elif "lost" in beside:
        weight.copy_(value)
        beside["lost"].copy_(value.sub_(weight))
    elif dice is not None:
        bits = value.view(torch.int32)
        weight.view(torch.int16).copy_(bits.add_(dice.roll(len(bits))) >> 16)
    else:
        weight.copy_(value)
