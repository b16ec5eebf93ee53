"""Batches: which examples pass the model together in which step. A pure function of (examples, plan, step).

    pack     examples lie behind each other in rows of one length, each with positions from 0 and a mask that hides the
             others. Nothing is wasted but the rows' ends, and every batch has the same shape, so the matrix library
             prepares its kernels once
    bucket   one example per row, rows of similar length together, padded on the right, where a causal model never
             looks: no mask is needed. For long examples, and for models whose attention takes no mask

A step takes about `tokens_per_step` positions. Because a step's batches are computed from its number, a resumed run
sees exactly those it would have seen.

Source: packing without cross-contamination, Krell et al., arXiv 2107.02027.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fivefold.training.cross_entropy import IGNORE
from fivefold.training.data import Example

STRETCH = 16
ROW, ROUND = 256, 32
PAD = 0
Layout = Literal["bucket", "pack"]


@dataclass(frozen=True, eq=False)
class Batch:
    """(rows, length) each: `tokens`, the `targets` of the next token (IGNORE where none), `positions`, and `segments`:
    which example of its row a position belongs to, from 1 (None: one per row); 0 is padding."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64] | None = None

    @property
    def learned(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORE).sum())

    @property
    def examples(self) -> int:
        return len(self.tokens) if self.segments is None else int(self.segments.max(axis=1).sum())


@dataclass(frozen=True, eq=False)
class Stream:
    """`step(n)` is the list of batches of 0-based step n, each of at most `at_once` positions (one row at least)."""

    rows: Sequence[Example]
    tokens_per_step: int
    at_once: int
    seed: int = 0
    layout: Layout = "pack"

    @cached_property
    def longest(self) -> int:
        return max(len(row.tokens) for row in self.rows)

    @cached_property
    def length(self) -> int:
        """Positions of a packed row: the longest example, rounded up, or more where examples are short."""
        return _rounded(max(self.longest, min(ROW, self.tokens_per_step)))

    @cached_property
    def _begins(self) -> list[int]:
        """The step each round begins at, as far as it is known."""
        return [0]

    def step(self, number: int) -> list[Batch]:
        while self._begins[-1] <= number:
            self._begins.append(self._begins[-1] + len(self.epoch(len(self._begins) - 1)))
        epoch = bisect_right(self._begins, number) - 1
        return self._batches(self.epoch(epoch)[number - self._begins[epoch]])

    @lru_cache(maxsize=2)  # noqa: B019
    def epoch(self, number: int) -> list[list[list[int]]]:
        """Per step the rows it holds, per row the examples in it, of one round over the examples."""
        draw = np.random.default_rng([self.seed, number])
        order = [int(i) for i in draw.permutation(len(self.rows))]
        lengths = [len(row.tokens) for row in self.rows]
        if self.layout == "pack":
            bins = _bins(order, lengths, self.length)
            bins = [bins[i] for i in draw.permutation(len(bins))]
            together = max(1, self.tokens_per_step // self.length)
            return [bins[i : i + together] for i in range(0, len(bins), together)]
        steps: list[list[list[int]]] = []
        for stretch in _cut(order, lengths, STRETCH * self.tokens_per_step):
            ordered = sorted(stretch, key=lambda i: lengths[i])
            steps += [[[i] for i in group] for group in _cut(ordered, lengths, self.tokens_per_step)]
        return [steps[i] for i in draw.permutation(len(steps))]

    def batches(self) -> list[Batch]:
        """All rows once: for scoring."""
        order = sorted(range(len(self.rows)), key=lambda i: (len(self.rows[i].tokens), self.rows[i].digest))
        lengths = [len(row.tokens) for row in self.rows]
        return self._batches(_bins(order, lengths, self.length) if self.layout == "pack" else [[i] for i in order])

    def _batches(self, bins: Sequence[Sequence[int]]) -> list[Batch]:
        rows = [[self.rows[i] for i in held] for held in bins]
        if self.layout == "pack":
            width = max(1, self.at_once // self.length)
            return [packed(rows[i : i + width], self.length) for i in range(0, len(rows), width)]
        groups: list[list[Example]] = []
        for row in sorted((row for held in rows for row in held), key=lambda row: len(row.tokens)):
            if groups and (len(groups[-1]) + 1) * min(_rounded(len(row.tokens)), self.longest) <= self.at_once:
                groups[-1].append(row)
            else:
                groups.append([row])
        return [padded(group, self.longest) for group in groups]


def _rounded(length: int) -> int:
    return -(-length // ROUND) * ROUND


def _bins(order: Sequence[int], lengths: Sequence[int], length: int) -> list[list[int]]:
    """First fit by falling length in stretches of the order: rows of at most `length`, well filled, still random."""
    bins: list[list[int]] = []
    for stretch in _cut(order, lengths, STRETCH * length):
        free: list[int] = []
        first = len(bins)
        for i in sorted(stretch, key=lambda i: -lengths[i]):
            home = next((k for k, room in enumerate(free) if room >= lengths[i]), None)
            if home is None:
                bins.append([i])
                free.append(length - lengths[i])
            else:
                bins[first + home].append(i)
                free[home] -= lengths[i]
    return bins


def _cut(order: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """`order` in groups of about `tokens` tokens each, at least one row in each."""
    groups: list[list[int]] = []
    held = tokens
    for i in order:
        if held + lengths[i] > tokens:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += lengths[i]
    return groups


def _targets(row: Example) -> NDArray[np.int64]:
    after = np.append(row.tokens[1:], IGNORE)
    return np.where(np.append(row.learn[1:], False), after, IGNORE)


def padded(rows: Sequence[Example], most: int) -> Batch:
    """One example per row, padded on the right to the longest, rounded up but to `most`, so never out of context."""
    length = min(_rounded(max(len(row.tokens) for row in rows)), most)
    tokens = np.full((len(rows), length), PAD, np.int64)
    targets = np.full((len(rows), length), IGNORE, np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
        targets[i, : len(row.tokens)] = _targets(row)
    return Batch(tokens, targets, np.tile(np.arange(length), (len(rows), 1)))


def packed(bins: Sequence[Sequence[Example]], length: int) -> Batch:
    """The examples of each bin behind each other in one row of `length`."""
    tokens = np.full((len(bins), length), PAD, np.int64)
    targets = np.full((len(bins), length), IGNORE, np.int64)
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    for i, held in enumerate(bins):
        at = 0
        for k, row in enumerate(held, start=1):
            part = slice(at, at + len(row.tokens))
            tokens[i, part], targets[i, part] = row.tokens, _targets(row)
            positions[i, part], segments[i, part] = np.arange(len(row.tokens)), k
            at += len(row.tokens)
    return Batch(tokens, targets, positions, segments)


def visible(batch: Batch) -> NDArray[np.bool_] | None:
    """Which position may see which, (rows, 1, length, length); None when causality alone decides."""
    if batch.segments is None:
        return None
    length = batch.tokens.shape[1]
    same = batch.segments[:, :, None] == batch.segments[:, None, :]
    return (same & np.tri(length, dtype=bool))[:, None]
