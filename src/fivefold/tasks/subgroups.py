"""Subgroups: does compression hurt some inputs more than the mean says?

Every token (or item) falls into one group of each partition; none of them looks at the candidate's answers:

    tokens   frequency   thirds by how often the true token stands in these windows: rare, mid, frequent
             position    thirds of its window: begin, middle, end
             kind        word start, continuation, digit, punctuation: by the characters of the true token
    items    length      thirds by the bytes of the question: short, medium, long
             answer      the right one's text where all items have the same choices, else its place

Per group: agreement and KL (tokens) or accuracy before, after and its change (items), with 95 % intervals. The excess
of a group is its mean minus that of all, and its error comes from both at once, because they share members:

    influence of i = [i in group] (x_i - mean_group) / n_group - (x_i - mean_all) / n

summed per window (or item), squared and added as any clustered variance (`_intervals`).

It misleads because the worst of ten groups is worse than the mean by chance alone: the interval of the worst one's
excess is Bonferroni's over all groups, and only groups of `LEAST` members can be it. "Rare" is relative to this text,
and a language written without spaces has hardly a word start.

Sources: Hooker et al., Characterising Bias in Compressed Models, arXiv 2010.03058; Sagawa et al., arXiv 1911.08731.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fivefold.errors import DataError
from fivefold.metrics import show
from fivefold.quantity import Quantity
from fivefold.tasks import _intervals, paired
from fivefold.tasks.choice import Answers, ChoiceSet, same_items
from fivefold.tasks.fidelity import Fidelity, Reference
from fivefold.tokenizer import Tokenizer

LEAST = 20
FREQUENCY, POSITION, LENGTH = ("rare", "mid", "frequent"), ("begin", "middle", "end"), ("short", "medium", "long")
KINDS = ("word start", "continuation", "digit", "punctuation")
Labels = Mapping[str, tuple[Sequence[str], NDArray[np.int64]]]
"""Partition -> (names of its groups, which one each member is in)."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """`values` by column. `excess` is by how much the group is worse than all, positive is worse."""

    by: str
    name: str
    n: int
    values: Mapping[str, Quantity]
    excess: Quantity

    def __str__(self) -> str:
        return f"{self.by}: {self.name}"


@dataclass(frozen=True, kw_only=True)
class Groups:
    """All groups of `members` ("tokens", "items"); `worst` by excess, None where no group is large enough."""

    members: str
    measure: str
    rows: tuple[Group, ...]

    @property
    def worst(self) -> Group | None:
        large = [g for g in self.rows if g.n >= LEAST and g.excess.value is not None]
        return max(large, key=lambda g: g.excess.value or 0.0) if len(large) > 1 else None

    def __str__(self) -> str:
        """The worst group in one sentence."""
        if (worst := self.worst) is None:
            return f"no two groups have {LEAST} {self.members}, so none is called the worst; ask for more"
        excess = worst.excess
        span = "" if excess.low is None else f" [{_bare(excess.low, excess.unit)}, {_bare(excess.high, excess.unit)}]"
        clear = excess.low is not None and excess.low > 0
        return (
            f"hurt most: {worst}, {self.measure} {show(excess.value, excess.unit)}{span} worse than the mean;"
            f" {'' if clear else 'not '}clear among {len(self.rows)} groups"
        )


def of_tokens(reference: Reference, found: Fidelity, tokenizer: Tokenizer) -> Groups:
    """agreement and kl of a candidate per group of tokens; the window is the unit of the intervals."""
    labels = {
        "frequency": (FREQUENCY, thirds(_counts(reference.true))),
        "position": (POSITION, np.concatenate([_split(len(w) - 1) for w in reference.windows])),
        "kind": (KINDS, kinds(reference.windows, tokenizer)),
    }
    total = sum(1 for _ in _members(labels))
    rows = [
        Group(by=by, name=name, n=int(inside.sum()), excess=excess(found.kl, inside, found.window, total, "nat/token"),
              values={"agreement": _intervals.proportion(found.agree[inside], found.window[inside]),
                      "kl": _intervals.mean(found.kl[inside], found.window[inside], "nat/token")})
        for by, name, inside in _members(labels)
    ]
    return Groups(members="tokens", measure="KL", rows=tuple(rows))


def of_items(asked: ChoiceSet, parent: Answers, candidate: Answers) -> Groups:
    """accuracy of parent and candidate per group of items, paired. Raises DataError when the items differ."""
    same_items(parent, candidate)
    if parent.digest != asked.digest:
        raise DataError(f"the answers are not to the items of {asked.name}; answer these with both models")
    sizes = np.array([len(i.contexts[i.answer].encode()) for i in asked.items])
    labels = {"length": (LENGTH, thirds(sizes)), "answer": _answers(asked)}
    total = sum(1 for _ in _members(labels))
    lost = parent.correct.astype(np.float64) - candidate.correct
    each = np.arange(len(lost))
    rows = [
        Group(by=by, name=name, n=int(inside.sum()), excess=excess(lost, inside, each, total, "fraction"),
              values={"A": _intervals.proportion(parent.correct[inside]),
                      "B": _intervals.proportion(candidate.correct[inside]), "change": _change(-lost[inside])})
        for by, name, inside in _members(labels)
    ]
    return Groups(members="items", measure="accuracy", rows=tuple(rows))


def excess(values: ArrayLike, inside: ArrayLike, clusters: ArrayLike, groups: int, unit: str) -> Quantity:
    """Mean of `values` (n,) where `inside` (n,) minus the mean of all, with the interval at 1 - 5 % / `groups`."""
    from scipy.stats import t

    x, here = np.asarray(values, np.float64), np.asarray(inside, bool)
    value = float(x[here].mean() - x.mean())
    influence = here * (x - x[here].mean()) / here.sum() - (x - x.mean()) / len(x)
    sums = np.bincount(np.unique(np.asarray(clusters), return_inverse=True)[1], influence)
    count = len(sums)
    if count < 2:
        return Quantity(value=value, unit=unit, method="measured", n=int(here.sum()), reason="no interval: one window")
    error = math.sqrt(count / (count - 1) * float((sums**2).sum()))
    half = float(t.ppf(1 - 0.025 / groups, count - 1)) * error
    return Quantity(value=value, unit=unit, method="measured", n=int(here.sum()), low=value - half, high=value + half)


def thirds(values: ArrayLike) -> NDArray[np.int64]:
    """0, 1 or 2 for each value (n,): below, between and above the terciles; equal values stay together."""
    x = np.asarray(values)
    return np.searchsorted(np.quantile(x, (1 / 3, 2 / 3), method="inverted_cdf"), x, side="left")


def kinds(windows: Sequence[Sequence[int]], tokenizer: Tokenizer) -> NDArray[np.int64]:
    """The place in `KINDS` of each token but the first of each window, by its text after the token before it."""
    known: dict[tuple[int, int], int] = {}
    found = []
    for window in windows:
        for pair in itertools.pairwise(window):
            if pair not in known:
                before = tokenizer.decode(pair[:1])
                known[pair] = _kind(before, tokenizer.decode(pair)[len(before) :])
            found.append(known[pair])
    return np.array(found, np.int64)


def _kind(before: str, text: str) -> int:
    core = text.strip()
    if core and all(c.isnumeric() for c in core):
        return 2
    if not any(c.isalnum() or c == "\ufffd" for c in core):
        return 3
    return 0 if text[:1].isspace() or not before or before[-1:].isspace() else 1


def _counts(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = np.bincount(tokens)[tokens]
    return counts


def _split(size: int) -> NDArray[np.int64]:
    return np.arange(size) * 3 // size


def _answers(asked: ChoiceSet) -> tuple[Sequence[str], NDArray[np.int64]]:
    items = asked.items
    fixed = len({i.continuations for i in items}) == 1
    most = max(len(i.continuations) for i in items)
    names = [c.strip()[:30] for c in items[0].continuations] if fixed else [f"number {k + 1}" for k in range(most)]
    return names, np.array([i.answer for i in items])


def _members(labels: Labels) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """(partition, group, mask) of every group that has a member."""
    for by, (names, where) in labels.items():
        for place, name in enumerate(names):
            if (inside := where == place).any():
                yield by, name, inside


def _change(differences: NDArray[np.float64]) -> Quantity:
    value, n = float(differences.mean()), len(differences)
    if n < 2:
        return Quantity(value=value, unit="fraction", method="measured", n=n, reason="no interval: one item only")
    low, high = paired.interval(differences)
    return Quantity(value=value, unit="fraction", method="measured", n=n, low=low, high=high)


def _bare(value: float | None, unit: str) -> str:
    return f"{100 * (value or 0):.1f}" if unit == "fraction" else f"{value or 0:.3g}"
