"""The one loop in which every engine generates: draw from each row, keep what the draft guessed right, decode on.

Every pass decodes the last token and a draft (empty without prompt lookup) and gives one row of logits for each. A
token is drawn from each row until one differs from the draft; the rest of the draft is then forgotten. An engine says
only how its cache is filled and cut back (`Passes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from fivefold.engines._lookup import Lookup
from fivefold.model import DecodePlan

T = TypeVar("T")
Row = TypeVar("Row")
Row_co = TypeVar("Row_co", covariant=True)


class Passes(Protocol[Row_co]):
    """One text in an engine's cache."""

    def first(self) -> Sequence[Row_co]:
        """Prefill the prompt; the one row after it."""
        ...

    def next(self, token: int, draft: list[int], kept: int) -> Sequence[Row_co]:
        """Keep the first `kept` tokens of the text in the cache, then decode `token` and `draft`: one row for each."""
        ...


def generated(
    passes: Passes[Row], prompt: Sequence[int], max_tokens: int, plan: DecodePlan, draw: Callable[[Row], int],
    stop: frozenset[int], alive: Callable[[], bool] = lambda: True,
) -> Iterator[int]:
    """Token ids as they are drawn. Raises RuntimeError when the session was used for another call in between."""
    lookup = Lookup(prompt, plan.lookup_ngram) if plan.lookup_tokens > 0 else None
    draft: list[int] = []
    rows = passes.first() if max_tokens > 0 else ()
    kept, left = len(prompt), max_tokens
    while left > 0:
        for place, row in enumerate(rows):
            token = draw(row)
            if token in stop:
                return
            yield token
            if not alive():
                raise RuntimeError("this text was interrupted: the session has been used for another call since")
            left -= 1
            if lookup is not None:
                lookup.append(token)
            if left == 0:
                return
            if place < len(draft) and token != draft[place]:
                break
        kept += place
        draft = [] if lookup is None else lookup.draft(min(plan.lookup_tokens, left - 1))
        rows = passes.next(token, draft, kept)
        kept += 1


def groups(items: Sequence[T], width: int) -> list[Sequence[T]]:
    """Consecutive groups of at most `width`."""
    return [items[first : first + width] for first in range(0, len(items), width)]
