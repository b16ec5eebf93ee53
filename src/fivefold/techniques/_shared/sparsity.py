"""How much may become zero and where: the refusals that pruning techniques share. Imports no torch."""

from __future__ import annotations

from fivefold.errors import Misfit, RecipeError
from fivefold.model import Blueprint

HALF = 0.5


def check_share(owner: str, sparsity: float, pattern: str, free: str, allocation: str = "uniform") -> None:
    """RecipeError when an n:m pattern is given another share than its own; `free` is the pattern without groups."""
    for name, wrong in (("sparsity", sparsity != HALF), ("allocation", allocation != "uniform")):
        if pattern != free and wrong:
            raise RecipeError(f'{owner}: {pattern} zeroes exactly half; leave {name} out or use pattern="{free}"')


def check_widths(owner: object, blueprint: Blueprint, pattern: str, free: str) -> None:
    """Misfit when the inputs of some linear layer do not divide into groups of the pattern."""
    if pattern == free:
        return
    size = int(pattern.split(":")[1])
    widths = (blueprint.width, blueprint.heads * blueprint.head_dim, blueprint.ffn)
    wrong = next((w for w in widths if w % size), None)
    if wrong is not None:
        raise Misfit(f'{owner} needs rows of a multiple of {size}, not {wrong}; use pattern="{free}"')
