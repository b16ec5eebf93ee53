"""Stop strings, found in text that arrives in pieces.

Text is held back while its end could still be the beginning of a stop string, so nothing of the stop is ever sent;
the hold-back is at most the longest stop string less one character.
"""

from __future__ import annotations


class Stops:
    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The part that may be sent; "" for ever after a stop was found."""
        if not self._stops or self.hit:
            return "" if self.hit else text
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.hit = True
            out, self._held = self._held[: min(places)], ""
            return out
        keep = max(self._overlap(stop) for stop in self._stops)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0
