"""Drawing one token from a row of logits: greedy, temperature, nucleus (top-p).

Temperature T divides the logits. The nucleus is the smallest set of most probable tokens whose mass reaches top_p;
only tokens of probability >= (1 - top_p) / vocab can belong to it, because the others together weigh less than
1 - top_p. So a few hundred values are sorted, not the whole vocabulary.

One uniform number is used per token, so equal seeds give equal text, with or without drafts.

Source: Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv 1904.09751.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import TYPE_CHECKING, TypeAlias

from fivefold.engines import Sampling
from fivefold.errors import DataError, NotFinite

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fivefold.engines._llama_context import Row

Logits: TypeAlias = "NDArray[np.float32] | Row"
"""(vocab,), an array or anything like one that can be indexed, made an array and asked for its argmax."""

BLOCK = 256
ROUGH_FLOOR = 1e-3
BROKEN = "the model's logits hold NaN or infinity, so they are no distribution; check its weights"


def drawer(sampling: Sampling) -> Callable[[Logits], int]:
    """The function logits (vocab,) -> token id; it keeps the random state. Raises DataError on bad settings.

    The function raises NotFinite when the logits hold NaN or infinity.
    """
    if not sampling.temperature >= 0 or not 0 < sampling.top_p <= 1:
        raise DataError(
            f"temperature {sampling.temperature} and top_p {sampling.top_p} cannot be sampled with;"
            " give temperature >= 0 and 0 < top_p <= 1"
        )
    if sampling.temperature == 0:
        return greedy
    import numpy as np

    random = np.random.default_rng(sampling.seed)
    scale = np.float32(1 / sampling.temperature)

    def draw(row: Logits) -> int:
        logits: NDArray[np.float32] = np.asarray(row)
        peak = logits.max()
        if not isfinite(peak):
            raise NotFinite(BROKEN)
        weights = logits - peak
        weights *= scale
        np.exp(weights, out=weights)
        if sampling.top_p < 1:
            return _from_nucleus(weights, sampling.top_p, random.random())
        return _inverse(weights, random.random())

    return draw


def distribution(row: Logits, sampling: Sampling) -> NDArray[np.float32]:
    """The probabilities (vocab,) that `drawer` of these settings draws by. Raises NotFinite."""
    import numpy as np

    logits: NDArray[np.float32] = np.asarray(row)
    if sampling.temperature == 0:
        out = np.zeros(len(logits), np.float32)
        out[greedy(row)] = 1.0
        return out
    peak = logits.max()
    if not isfinite(peak):
        raise NotFinite(BROKEN)
    weights = np.exp((logits - peak) * np.float32(1 / sampling.temperature))
    if sampling.top_p < 1:
        kept = _nucleus(weights, sampling.top_p)
        inside = np.zeros_like(weights)
        inside[kept] = weights[kept]
        weights = inside
    weights /= weights.sum(dtype=np.float64)
    return weights


class Judge:
    """Speculative sampling: a guess drawn from q is kept, or a token drawn in its place, so that p is what is drawn."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random: np.random.Generator | None = None

    def __call__(self, row: Logits, guess: int, doubt: NDArray[np.float32]) -> int:
        import numpy as np

        if self._random is None:
            self._random = np.random.default_rng((self.sampling.seed, 1))
        p = distribution(row, self.sampling)
        if self._random.random() * doubt[guess] < p[guess]:
            return guess
        rest = np.maximum(p - doubt, 0)
        if not rest.any():
            return guess
        return _inverse(rest, self._random.random())


def greedy(logits: Logits) -> int:
    """The most probable token, the first of equals (argmax stops at a NaN, so one look finds any)."""
    token = int(logits.argmax())
    if not isfinite(logits[token]):
        raise NotFinite(BROKEN)
    return token


def _inverse(weights: NDArray[np.float32], uniform: float) -> int:
    """The index whose cumulative weight first exceeds uniform * total: first the block of 256, then the place in it.

    A cumulative sum of a whole vocabulary takes half a millisecond; this takes a tenth of that.
    """
    import numpy as np

    blocks = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK)), dtype=np.float64)
    target = uniform * blocks[-1]
    block = min(int(np.searchsorted(blocks, target, "right")), len(blocks) - 1)
    before = blocks[block - 1] if block else 0.0
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    share = (target - before) / (blocks[block] - before)
    return block * BLOCK + min(int(np.searchsorted(inside, share * inside[-1], "right")), len(inside) - 1)


def _from_nucleus(weights: NDArray[np.float32], top_p: float, uniform: float) -> int:
    kept = _nucleus(weights, top_p)
    return int(kept[_inverse(weights[kept], uniform)])


def _nucleus(weights: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """Sorts only the tokens above a floor: a rough one if those weigh enough, else the sure one of the module text."""
    import numpy as np

    needed = top_p * float(weights.sum(dtype=np.float64))
    sure = needed * (1 - top_p) / top_p / len(weights) * 0.999
    for floor in (max(ROUGH_FLOOR, sure), sure):
        candidates = np.flatnonzero(weights >= floor)
        order = candidates[np.argsort(-weights[candidates], kind="stable")]
        mass = np.cumsum(weights[order], dtype=np.float64)
        size = int(np.searchsorted(mass, needed)) + 1
        if size <= len(order):
            break
    kept: NDArray[np.int64] = order[:size]
    return kept


def log_softmax(logits: NDArray[np.float32], out: NDArray[np.float32], block: int = 16) -> None:
    """Row-wise log-softmax of (rows, vocab) into `out`, a few rows at a time so that they stay in the cache.

    Raises NotFinite when a logit is NaN or infinite.
    """
    import numpy as np

    for first in range(0, len(logits), block):
        rows, target = logits[first : first + block], out[first : first + block]
        peaks = rows.max(axis=1, keepdims=True)
        if not np.isfinite(peaks).all():
            raise NotFinite(BROKEN)
        np.subtract(rows, peaks, out=target)
        target -= np.log(np.exp(target).sum(axis=1, keepdims=True))
