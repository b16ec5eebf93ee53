"""Prompt lookup: guess the next tokens by finding where the text repeats itself.

If the last `ngram` tokens occurred earlier, what followed them then is a draft of what follows now. The model checks
a whole draft in one pass, which costs little more than one token as long as decoding waits for memory. Among the
earlier places the one that shares the longest run of tokens with the end wins, the latest of equals.

The draft needs no model and its check is exact: the caller draws each token from the model's own distribution as
always, and a draft token counts as accepted when the drawn token equals it. So the text is the one that would have
come without drafts (a pass over several tokens may differ from one-token passes in the last bits). It pays on text
that copies (summaries, edits, code); on fresh text nearly every draft is rejected and its passes are wasted.

Source: prompt lookup decoding (Saxena, 2023); verification as in Leviathan et al., arXiv 2211.17192, for the
special case of a draft that is certain of itself.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_SUFFIX = 32
PLACES_TRIED = 16


class Lookup:
    """The text so far and an index of its n-grams. `append` and `draft` cost microseconds at any length."""

    doubts: None = None

    def __init__(self, tokens: Sequence[int], ngram: int = 2) -> None:
        if ngram < 1:
            raise ValueError("ngram must be at least 1")
        self.ngram = ngram
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add one token to the text. The index runs one token behind, so that the end never finds itself."""
        end = len(self.tokens)
        if end >= self.ngram:
            self._ends.setdefault(tuple(self.tokens[-self.ngram :]), []).append(end)
        self.tokens.append(token)

    def draft(self, count: int) -> list[int]:
        """Up to `count` tokens that may follow the text; [] when its last `ngram` tokens are new."""
        tokens = self.tokens
        if count < 1 or len(tokens) < self.ngram:
            return []
        best, longest = 0, 0
        for end in reversed(self._ends.get(tuple(tokens[-self.ngram :]), [])[-PLACES_TRIED:]):
            length = self._shared(end)
            if length > longest:
                best, longest = end, length
        return tokens[best : best + count] if longest else []

    def _shared(self, end: int) -> int:
        """How many tokens before `end` equal the tokens at the end of the text."""
        tokens, length = self.tokens, 0
        while length < min(end, LONGEST_SUFFIX) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        return length
