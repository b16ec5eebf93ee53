"""Masks: which single numbers of a model are trained, and how all others stay bit for bit what they were.

The `count` largest of all numbers of a model are found without sorting or holding them. A non-negative float32 orders
like its bits read as an integer, so one histogram over the upper 16 bits of all of them says in which bin the
count-th largest lies, and one over the lower 16 bits of that bin says which number it is:

    t = the count-th largest,  mask = x > t, and of x = t the first, in the order of names and positions

Exactly `count` positions, the same on every run, with one tensor in memory at a time.

A masked gradient is zero outside its mask; an update `by_number` then leaves those weights alone. What is handed on
takes them from the stored model, so they are equal even where weights are held less exactly than they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from fivefold.training.delta import Delta
from fivefold.training.method import Lesson
from fivefold.training.run import stored_value

Masks = Mapping[str, torch.Tensor]
HALF = 1 << 16


def empty(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A mask per parameter that lets nothing through, one byte per number."""
    return {name: torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()}


@torch.no_grad()
def fill_largest(masks: Masks, magnitude: Callable[[str], torch.Tensor], count: int) -> None:
    """Set `masks` to the `count` largest |magnitude(name)| of all of them together (see the module)."""
    def bits(name: str) -> torch.Tensor:
        return magnitude(name).float().abs().contiguous().view(torch.int32).view(-1)

    if not 0 < count <= sum(mask.numel() for mask in masks.values()):
        raise ValueError(f"cannot choose {count} of {sum(mask.numel() for mask in masks.values())} numbers")
    counts = torch.zeros(HALF, dtype=torch.int64)
    for name in masks:
        counts += torch.bincount(bits(name) >> 16, minlength=HALF).cpu()
    upper, above = _bin(counts, count)
    counts.zero_()
    for name in masks:
        near = bits(name)
        counts += torch.bincount(near[near >> 16 == upper] & (HALF - 1), minlength=HALF).cpu()
    lower, more = _bin(counts, count - above)
    threshold, ties = (upper << 16) + lower, count - above - more
    for name, mask in masks.items():
        found = bits(name)
        flat = found > threshold
        equal = (found == threshold).nonzero().squeeze(-1)[:ties]
        flat[equal] = True
        ties -= len(equal)
        mask.copy_(flat.view(mask.shape))


def _bin(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """(bin that holds the `wanted`-th from above, how many lie in higher bins)."""
    from_above = counts.flip(0).cumsum(0)
    at = int(torch.searchsorted(from_above, wanted))
    return len(counts) - 1 - at, int(from_above[at] - counts[len(counts) - 1 - at])


def apply(parameters: Mapping[str, torch.nn.Parameter], masks: Masks) -> None:
    """Gradients outside the masks become zero, in place."""
    for name, mask in masks.items():
        gradient = parameters[name].grad
        if gradient is not None:
            gradient.mul_(mask)


def chosen(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def learned(lesson: Lesson, masks: Masks, value: Callable[[str], torch.Tensor]) -> Delta:
    """Sparse: trained where the mask lets through, stored everywhere else."""
    def kept(name: str) -> torch.Tensor:
        return torch.where(masks[name], value(name), stored_value(lesson, name))

    return Delta(weights={name: partial(kept, name) for name in masks}, sparse=frozenset(masks))
