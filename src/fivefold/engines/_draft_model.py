"""Drafts by a smaller model of the same tokenizer, and speculative sampling.

The small model guesses k tokens one after the other; the large one looks at all of them in one pass. With p and q the
two distributions at a place, a guess x (drawn from q) is kept with probability min(1, p(x) / q(x)); the first that is
not kept is replaced by a draw from max(0, p - q), scaled to 1. So every token has exactly the distribution p: nothing
is lost. With a = sum_x min(p, q) the chance that a guess is kept, a pass yields on average

    (1 - a^(k+1)) / (1 - a)    tokens, at the price of k passes of the small model.

Greedy decoding is the case in which p and q are certain of one token. The small model runs in llama.cpp, whichever
engine runs the large one; its cache follows the text and forgets what was not kept.

Source: Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fivefold.engines import Sampling
from fivefold.engines._sampling import distribution, drawer, greedy
from fivefold.errors import ModelError
from fivefold.model import DecodePlan, Model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fivefold.engines._llama_context import Context
    from fivefold.engines.llama_cpp import LlamaSession


class DraftModel:
    """The small model of one session. `vocab` must be that of the large one; raises ModelError otherwise."""

    def __init__(self, model: Model, draft: Path) -> None:
        from fivefold.engines.llama_cpp import LlamaSession

        small = replace(
            model, path=draft, format="gguf", decode=DecodePlan(), run=replace(model.run, cache_type="f16", batch=1)
        )
        self.session = LlamaSession(small)
        if self.session.vocab != model.blueprint.vocab:
            self.session.close()
            raise ModelError(
                f"the draft {draft.name} has {self.session.vocab} tokens and {model.name} {model.blueprint.vocab};"
                " a draft needs the same tokenizer"
            )

    def text(self, prompt: Sequence[int], max_tokens: int, most: int, sampling: Sampling) -> DraftText:
        """Drafts of at most `most` tokens for one text."""
        return DraftText(self.session, prompt, len(prompt) + max_tokens + most, sampling)

    def close(self) -> None:
        self.session.close()


class DraftText:
    """A text as the small model follows it: `_drafting.Drafter`. `doubts` are the q of the last draft."""

    def __init__(self, session: LlamaSession, prompt: Sequence[int], room: int, sampling: Sampling) -> None:
        self.tokens = list(prompt)
        self.doubts: list[NDArray[np.float32]] | None = None
        self._session, self._room, self._sampling = session, room, sampling
        self._begin()
        self._draw = drawer(replace(sampling, seed=sampling.seed + 1))

    def _begin(self) -> None:
        self._context: Context = self._session._fitting(self._room, outputs=1)
        self._turn, self._cached = self._session._turn, list[int]()

    def append(self, token: int) -> None:
        self.tokens.append(token)

    def draft(self, count: int) -> list[int]:
        """`count` guesses at what follows the text."""
        if count < 1:
            return []
        row, found = self._caught_up(), list[int]()
        doubts: list[NDArray[np.float32]] = []
        certain = self._sampling.temperature == 0
        for left in range(count, 0, -1):
            if certain:
                token = greedy(row)
            else:
                doubts.append(distribution(row, self._sampling))
                token = self._draw(row)
            found.append(token)
            if left > 1:
                row = self._context.step(token, [], len(self._cached))[0]
                self._cached.append(token)
        self.doubts = None if certain else doubts
        return found

    def _caught_up(self) -> Any:
        """The small model's logits after the text; what its cache holds beyond the text is forgotten."""
        if self._turn != self._session._turn:
            self._begin()
        same = 0
        most = min(len(self._cached), len(self.tokens) - 1)
        while same < most and self._cached[same] == self.tokens[same]:
            same += 1
        if same < len(self._cached):
            self._context.forget(same)
        fresh = self.tokens[same:]
        if same == 0:
            row = self._context.prefill(array("i", fresh))
        else:
            self._context.decode(fresh, same, every=False)
            row = self._context.row(len(fresh) - 1)
        self._cached = list(self.tokens)
        return row


def opened(model: Model) -> DraftModel | None:
    """The small model that the decode plan names, if it names one."""
    plan = model.decode
    return DraftModel(model, plan.draft) if plan.draft is not None and plan.draft_tokens > 0 else None
