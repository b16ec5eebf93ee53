"""The one loop in which every engine generates: draw from each row, keep what the draft guessed right, decode on.

Every pass decodes the last token and a draft (empty where nothing drafts) and gives one row of logits for each. A
token is drawn from each row until one differs from the draft; the rest of the draft is then forgotten. An engine says
only how its cache is filled and cut back (`Passes`). A drafter that is not certain of its guesses says how likely each
was, and `_sampling.Judge` then draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from fivefold.engines import Sampling
from fivefold.engines._lookup import Lookup
from fivefold.engines._sampling import Judge, drawer
from fivefold.model import DecodePlan

T = TypeVar("T")
Row = TypeVar("Row")
Row_co = TypeVar("Row_co", covariant=True)


class Drafter(Protocol):
    """Follows one text and guesses what comes next."""

    def append(self, token: int) -> None: ...

    def draft(self, count: int) -> list[int]:
        """At most `count` guesses at what follows the text."""
        ...

    @property
    def doubts(self) -> Sequence[Any] | None:
        """The distribution (vocab,) that each guess of the last draft was drawn from; None: guesses are certain."""
        ...


class Passes(Protocol[Row_co]):
    """One text in an engine's cache."""

    def first(self) -> Sequence[Row_co]:
        """Prefill the prompt; the one row after it."""
        ...

    def next(self, token: int, draft: list[int], kept: int) -> Sequence[Row_co]:
        """Keep the first `kept` tokens of the text in the cache, then decode `token` and `draft`: one row for each."""
        ...


def generated(
    passes: Passes[Row], prompt: Sequence[int], max_tokens: int, plan: DecodePlan, sampling: Sampling,
    alive: Callable[[], bool] = lambda: True, drafter: Drafter | None = None,
) -> Iterator[int]:
    """Token ids as they are drawn. Without a `drafter` the plan's prompt lookup drafts.

    Raises RuntimeError when the session was used for another call in between.
    """
    draw, judge = drawer(sampling), Judge(sampling)
    if drafter is None and plan.lookup_tokens > 0:
        drafter = Lookup(prompt, plan.lookup_ngram)
    return _tokens(passes, len(prompt), max_tokens, plan.drafted, draw, judge, sampling.stop, alive, drafter)


def _tokens(
    passes: Passes[Any], kept: int, left: int, most: int, draw: Callable[[Any], int], judge: Judge,
    stop: frozenset[int], alive: Callable[[], bool], drafter: Drafter | None,
) -> Iterator[int]:
    draft: list[int] = []
    doubts: Sequence[Any] | None = None
    rows = passes.first() if left > 0 else ()
    while left > 0:
        for place, row in enumerate(rows):
            token = draw(row) if doubts is None or place == len(draft) else judge(row, draft[place], doubts[place])
            if token in stop:
                return
            yield token
            if not alive():
                raise RuntimeError("this text was interrupted: the session has been used for another call since")
            left -= 1
            if drafter is not None:
                drafter.append(token)
            if left == 0:
                return
            if place < len(draft) and token != draft[place]:
                break
        kept += place
        draft = [] if drafter is None else drafter.draft(min(most, left - 1))
        doubts = None if drafter is None else drafter.doubts
        rows = passes.next(token, draft, kept)
        kept += 1


def groups(items: Sequence[T], width: int) -> list[Sequence[T]]:
    """Consecutive groups of at most `width`."""
    return [items[first : first + width] for first in range(0, len(items), width)]
