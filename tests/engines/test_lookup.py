from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fivefold.engines._lookup import LONGEST_SUFFIX, Lookup


def longest_match(tokens: list[int], ngram: int, count: int) -> list[int]:
    """Brute force: of all earlier ends, the longest shared suffix, the latest of equals."""
    best, longest = 0, ngram - 1
    for end in range(1, len(tokens)):
        length = 0
        while length < min(end, LONGEST_SUFFIX) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= ngram and length >= longest:
            best, longest = end, length
    return tokens[best : best + count] if best else []


@given(st.lists(st.integers(0, 2), max_size=18), st.integers(1, 4), st.integers(0, 6))
def test_equals_brute_force(tokens: list[int], ngram: int, count: int) -> None:
    """18 tokens cannot hold more places than are tried, so the answer is the best of all."""
    assert Lookup(tokens, ngram).draft(count) == longest_match(tokens, ngram, count)


@given(st.lists(st.integers(0, 2), max_size=18), st.integers(1, 3))
def test_appending_equals_starting_with_the_whole_text(tokens: list[int], ngram: int) -> None:
    grown = Lookup([], ngram)
    for token in tokens:
        grown.append(token)
    assert grown.draft(5) == Lookup(tokens, ngram).draft(5)


def test_a_copy_is_continued() -> None:
    assert Lookup([1, 2, 3, 4, 5, 9, 2, 3]).draft(3) == [4, 5, 9]
    assert Lookup([1, 2, 3, 7, 2, 3, 8, 1, 2, 3]).draft(1) == [7], "the longer match wins over the later one"
    assert Lookup([1, 2, 3, 4]).draft(3) == []
