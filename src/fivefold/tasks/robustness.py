"""Robustness: how many right answers survive an attack on the question, and how often the attack has to ask.

The attack is greedy and sees only the model's probabilities of the choices. For each item the model gets right:

    1. rank     leave out one word of the question at a time; the more the margin of the right answer falls, the
                more important the word (margin = log p(right) - log p(best other))
    2. edit     the most important word first, try each edit of `_edits` and keep the one that lowers the margin most
    3. stop     when the answer flips, when 20 % of the words (at least one) are changed, or after `QUERIES` queries

    after_attack     share of all items right before and after
    attack_queries   mean number of queries per attacked item; one query scores all choices of an item once

An edit by letters swaps two neighbours, drops one, doubles one or hits a neighbouring key, in words of four or more and
never the first letter. An edit by words drops a word of `STOP`, swaps two neighbours of two letters or more, or takes a
word from `ALIKE`. Choices, numbers, punctuation and labels of the prompt ("Answer:") stay; where the choices have
contexts of their own, only what these share is edited. All random places follow from the seed and the item's text.

This is not TextFooler, which replaces words by neighbours in an embedding and checks the sentence's meaning by another
model: nothing here proves that a person would still answer the same. So compare two models under one attack only. It
misleads where the parent is near chance (there is little margin to defend), and queries grow with the length of a
question and stop at the budget. The attack adapts to each model, so their items are paired but their texts differ.

Sources: Jin et al., Is BERT Really Robust? (TextFooler), arXiv 1907.11932; Belinkov and Bisk, arXiv 1711.02173.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fivefold.engines import Session
from fivefold.errors import DataError
from fivefold.quantity import Measurement, Quantity
from fivefold.tasks import _intervals
from fivefold.tasks.choice import ChoiceSet, Item, answer
from fivefold.tokenizer import Tokenizer

QUERIES = 150
SHARE = 0.2
LETTERS = 4
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
STOP = frozenset({
    "a", "an", "the", "of", "to", "in", "on", "at", "by", "for", "with", "from", "as", "is", "are", "was",
    "were", "be", "been", "am", "that", "this", "these", "those", "it", "its", "there", "and", "or", "so",
    "very", "really", "just", "quite", "also", "then",
})
"""Dropping one of these seldom changes what is asked; no negation, no question word."""
ALIKE = {
    word: pair[1 - i] for pair in (
        ("big", "large"), ("small", "little"), ("good", "fine"), ("bad", "poor"), ("fast", "quick"), ("begin", "start"),
        ("movie", "film"), ("funny", "comical"), ("smart", "clever"), ("sad", "unhappy"), ("happy", "glad"),
        ("hard", "difficult"), ("easy", "simple"), ("make", "create"), ("get", "obtain"), ("use", "employ"),
        ("show", "display"), ("help", "assist"), ("need", "require"), ("buy", "purchase"), ("story", "tale"),
        ("boring", "dull"), ("beautiful", "lovely"), ("strange", "odd"), ("rich", "wealthy"), ("sick", "ill"),
        ("whole", "entire"), ("often", "frequently"), ("near", "close"), ("people", "persons"), ("child", "kid"),
    ) for i, word in enumerate(pair)
}
"""Word -> one of nearly the same meaning. Small on purpose: it is all the attack knows of English."""
_WORD = re.compile(r"([^\W\d_]+(?:['’][^\W\d_]+)*)")

Ask = Callable[[str], tuple[float, bool]]
"""A question's shared text -> (margin of the right answer, whether it is still chosen); an edited text that the model
cannot read, because it outgrew the context, has an infinite margin and so is never kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacked:
    """One item: right `before`, right `after`; queries spent, words changed, and the shared text as it was left."""

    before: bool
    after: bool
    queries: int = 0
    edits: int = 0
    text: str = ""


@dataclass(frozen=True, eq=False)
class Attack:
    """What the attack did to the items of a set, in their order."""

    name: str
    digest: str
    items: tuple[Attacked, ...]

    @property
    def held(self) -> NDArray[np.bool_]:
        """Right before and after, shape (n,)."""
        return np.array([i.after for i in self.items])

    @property
    def measurement(self) -> Measurement:
        """after_attack and attack_queries with 95 % intervals."""
        asked = [float(i.queries) for i in self.items if i.queries]
        queries = (
            _intervals.mean(asked, np.arange(len(asked)), "1") if asked
            else Quantity.missing("1", "no item was right and had a word to edit")
        )
        context = {"attacked": self.name, "attacked_items": len(asked),
                   "words_changed": sum(i.edits for i in self.items)}
        return Measurement({"after_attack": _intervals.proportion(self.held), "attack_queries": queries}, context)


def attack(session: Session, tokenizer: Tokenizer, items: ChoiceSet, seed: int = 0, queries: int = QUERIES) -> Attack:
    """Attack every item that the model gets right. Raises NotFinite, DataError."""
    if queries < 1:
        raise DataError(f"an attack of {queries} queries asks nothing; allow at least 1")
    found = []
    for item in items.items:
        def ask(text: str, item: Item = item) -> tuple[float, bool]:
            one = replace(items, items=(_with(item, text),))
            try:
                p = answer(session, tokenizer, one).probabilities[0]
            except DataError:
                if text == shared(item):
                    raise
                return math.inf, True
            others = np.delete(p, item.answer).max()
            margin = float(np.log(max(p[item.answer], 1e-300)) - np.log(max(others, 1e-300)))
            return margin, bool(p.argmax() == item.answer)

        found.append(_one(shared(item), ask, seed, queries))
    return Attack(items.name, items.digest, tuple(found))


def joined(attacks: Sequence[Attack]) -> Attack:
    """The attacks on several sets as one: their items side by side."""
    digest = hashlib.sha256(" ".join(a.digest for a in attacks).encode()).hexdigest()[:16]
    return Attack(" + ".join(a.name for a in attacks), digest, tuple(i for a in attacks for i in a.items))


def shared(item: Item) -> str:
    """The text that may be edited: what all contexts begin with, up to the end of a word where they differ."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*item.contexts, strict=False))
    text = "".join(letters[0] for letters in same)
    return text if len(set(item.contexts)) == 1 else text[: max(text.rfind(" "), text.rfind("\n")) + 1]


def _with(item: Item, text: str) -> Item:
    size = len(shared(item))
    return replace(item, contexts=tuple(text + context[size:] for context in item.contexts))


def _one(text: str, ask: Ask, seed: int, limit: int) -> Attacked:
    """Attack one question."""
    margin, right = ask(text)
    if not right:
        return Attacked(before=False, after=False, text=text)
    parts = _WORD.split(text)
    words = [i for i in range(1, len(parts), 2) if not parts[i + 1].startswith(":")]
    asked, ranking = 0, []
    for i in words:
        left_out = "".join(_without(parts, i))
        if left_out.strip() and asked < limit:
            ranking.append((margin - ask(left_out)[0], -i))
            asked += 1
    ranking.sort(reverse=True)
    room, changed = max(1, int(SHARE * len(words))), set[int]()
    for i in (-place for _, place in ranking):
        best: tuple[float, list[str], set[int]] = (margin, parts, changed)
        for edited, touched in _edits(parts, i, set(words), random.Random(f"{seed}:{i}:{text}")):
            if asked == limit or len(changed | touched) > room or changed & touched:
                continue
            now, right = ask("".join(edited))
            asked += 1
            if not right:
                return Attacked(before=True, after=False, queries=asked, edits=len(changed | touched),
                                text="".join(edited))
            if now < best[0]:
                best = (now, edited, changed | touched)
        margin, parts, changed = best
        if len(changed) >= room or asked == limit:
            break
    return Attacked(before=True, after=True, queries=asked, edits=len(changed), text="".join(parts))


def _edits(
    parts: list[str], i: int, words: set[int], rng: random.Random
) -> Iterator[tuple[list[str], set[int]]]:
    """(parts after one edit of word i, the words it changed), letters first; odd places of `parts` hold words."""
    word = parts[i]
    for new in dict.fromkeys((*_misspelled(word, rng), *_alike(word))):
        yield [*parts[:i], new, *parts[i + 1 :]], {i}
    if word.lower() in STOP and "".join(_without(parts, i)).strip():
        yield _without(parts, i), {i}
    after = i + 2
    if after in words and parts[i + 1] == " " and parts[after] != word and min(len(word), len(parts[after])) > 1:
        yield [*parts[:i], parts[after], " ", word, *parts[after + 1 :]], {i, after}


def _misspelled(word: str, rng: random.Random) -> Iterator[str]:
    """The word with one letter swapped, dropped, doubled and mistyped, each at one random place but the first."""
    if len(word) < LETTERS:
        return
    if places := [i for i in range(1, len(word) - 1) if word[i] != word[i + 1]]:
        i = rng.choice(places)
        yield word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    i = rng.randrange(1, len(word))
    yield word[:i] + word[i + 1 :]
    i = rng.randrange(1, len(word))
    yield word[: i + 1] + word[i:]
    if places := [i for i in range(1, len(word)) if beside(word[i])]:
        i = rng.choice(places)
        yield word[:i] + rng.choice(beside(word[i])) + word[i + 1 :]


def beside(letter: str) -> str:
    """The keys left and right of a letter on a QWERTY keyboard, in its case; "" for what is no letter there."""
    row = next((r for r in KEYS if letter.lower() in r), "")
    at = row.find(letter.lower())
    near = row[max(0, at - 1) : at] + row[at + 1 : at + 2] if row else ""
    return near.upper() if letter.isupper() else near


def _alike(word: str) -> Iterator[str]:
    if found := ALIKE.get(word.lower()):
        yield found.capitalize() if word[0].isupper() else found


def _without(parts: Sequence[str], i: int) -> list[str]:
    """The parts without word i and one of the spaces around it."""
    after, before = parts[i + 1], parts[i - 1]
    if after.startswith(" "):
        return [*parts[:i], "", after[1:], *parts[i + 2 :]]
    return [*parts[: i - 1], before.removesuffix(" "), "", *parts[i + 1 :]]
