"""The attack on classifiers whose weak word is known, with queries counted by hand."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fivefold.errors import DataError
from fivefold.tasks.choice import ChoiceSet, Item, answer
from fivefold.tasks.robustness import (
    ALIKE,
    KEYS,
    QUERIES,
    STOP,
    Attack,
    Attacked,
    _misspelled,
    attack,
    beside,
    joined,
    shared,
)


class Letters:
    """One token per character, so that a fake model can read its input."""

    bos = None

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


class Keyword:
    """Adds up the weights of the words it finds in the question; prefers "yes" by that much over "no".

    Its two answers end in one token after the same others, so each query is one call of `score`.
    """

    vocab = 1 << 12

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights, self.calls = weights, 0

    def score(self, tokens: Sequence[int]) -> np.ndarray:
        self.calls += 1
        text = "".join(map(chr, tokens))
        words = text.replace(".", " ").split()
        strength = sum(self.weights.get(w, 0.0) for w in words)
        out = np.full((len(tokens), self.vocab), -20.0, np.float32)
        for place in range(len(tokens)):
            out[place, ord("y")], out[place, ord("n")] = -1.0 + strength / 2, -1.0 - strength / 2
        return out


def asked(question: str, answer_: int = 0, choices: Sequence[str] = ("y", "n")) -> ChoiceSet:
    return ChoiceSet("toy", (Item.of(question, choices, answer_),), by_length=False)


def run(model: Keyword, items: ChoiceSet, **more: int) -> Attacked:
    return attack(model, Letters(), items, **more).items[0]  # type: ignore[arg-type]


QUESTION = "we saw that marvelous thing under some wide grey roof"


def test_the_weak_word_is_found_and_queries_are_counted() -> None:
    """10 words are ranked; the weak one comes first, and its first misspelling flips the answer: 11 queries."""
    model = Keyword({"marvelous": 2.0, "we": -0.5})
    found = run(model, asked(QUESTION))
    assert (found.before, found.after, found.edits) == (True, False, 1)
    changed = [(a, b) for a, b in zip(QUESTION.split(), found.text.split(), strict=True) if a != b]
    assert [a for a, _ in changed] == ["marvelous"] and changed[0][1][0] == "m"
    assert found.queries == 10 + 1
    assert model.calls == 1 + found.queries, "the clean question, then each query"


def test_the_attack_really_flips_the_answer_it_reports() -> None:
    model = Keyword({"marvelous": 2.0, "we": -0.5})
    items = asked(QUESTION)
    left = run(model, items).text
    moved = replace(items, items=(Item.of(left, ("y", "n"), 0),))
    assert answer(model, Letters(), moved).predictions.tolist() == [1]  # type: ignore[arg-type]
    assert answer(model, Letters(), items).correct.all()  # type: ignore[arg-type]


def test_twenty_percent_of_words_at_most() -> None:
    """Strength is spread over ten words, so two edits of ten cannot turn it."""
    model = Keyword(dict.fromkeys(QUESTION.split(), 1.0))
    found = run(model, asked(QUESTION))
    assert (found.before, found.after) == (True, True)
    assert found.edits == 2
    differing = sum(a != b for a, b in zip(QUESTION.split(), found.text.split(), strict=True))
    assert differing == 2
    assert run(Keyword({"four": 1.0, "lone": 1.0}), asked("four lone")).edits == 1, "one word is always allowed"


@pytest.mark.parametrize("limit", [1, 5, 10, 12])
def test_the_budget_of_queries_is_kept(limit: int) -> None:
    model = Keyword(dict.fromkeys(QUESTION.split(), 1.0))
    found = run(model, asked(QUESTION), queries=limit)
    assert found.queries == limit and model.calls == 1 + limit and found.after


def test_wrong_items_are_not_attacked() -> None:
    model = Keyword({"marvelous": 2.0})
    found = attack(model, Letters(), asked(QUESTION, 1))  # type: ignore[arg-type]
    assert model.calls == 1 and found.items[0] == Attacked(before=False, after=False, text=QUESTION)
    assert found.measurement.value("after_attack") == 0
    assert found.measurement["attack_queries"].value is None and "right" in found.measurement["attack_queries"].reason


def test_letters_need_four_and_the_first_stays() -> None:
    """The only word that matters is short and no stop word: nothing but an exchange touches it."""
    model = Keyword({"fox": 1.0})
    found = run(model, asked("fox ran"))
    assert found.after and found.queries == 2, "two ranked, none edited: an exchange would change all two words"
    model = Keyword({"very": 1.0, "dogs": 1.0, "nice": -1.5})
    found = run(model, asked("very nice dogs are nice dogs"))
    assert not found.after and found.edits == 1


@given(st.from_regex(r"[A-Za-z]{1,12}", fullmatch=True), st.integers(0, 99))
def test_a_misspelling_is_one_slip_and_spares_the_first_letter(word: str, seed: int) -> None:
    found = list(_misspelled(word, random.Random(seed)))
    assert bool(found) == (len(word) >= 4)
    for new in found:
        assert new[0] == word[0] and abs(len(new) - len(word)) <= 1
        differing = sum(a != b for a, b in zip(new, word, strict=False))
        same_letters = sorted(new) == sorted(word)
        assert len(new) != len(word) or differing == 1 or (differing == 2 and same_letters)
    assert len(word) < 4 or {len(n) - len(word) for n in found} >= {-1, 1}


def test_a_stop_word_is_dropped_and_a_word_replaced() -> None:
    found = run(Keyword({"the": 1.0, "zq": -0.5}), asked("see the zq"))
    assert (found.text, found.queries) == ("see zq", 3 + 1)
    assert set(STOP).isdisjoint({"not", "no", "never", "nor", "who", "what"})
    assert all(ALIKE[ALIKE[w]] == w for w in ALIKE)
    found = run(Keyword({"big": 1.0, "ox": -0.5}), asked("big ox"))
    assert (found.text, found.queries) == ("large ox", 2 + 1)


def test_labels_numbers_and_choices_stay() -> None:
    model = Keyword({"Question:": 3.0, "Answer:": 3.0, "1984": 3.0})
    text = "Question: in 1984 somebody wrote books\nAnswer:"
    found = run(model, asked(text))
    assert found.after
    assert found.text.startswith("Question: ") and found.text.endswith("\nAnswer:") and "1984" in found.text
    assert found.queries > 4


def test_own_contexts_share_their_beginning() -> None:
    item = Item(("Ann saw Eve so Ann", "Ann saw Eve so Eve"), (" won", " won"), 0)
    assert shared(item) == "Ann saw Eve so "
    assert shared(Item(("a b", "a bc"), (" x", " x"), 0)) == "a "
    assert shared(Item.of("all of it", ["x", "y"], 0)) == "all of it"


def test_seed_and_text_decide_everything() -> None:
    model = Keyword(dict.fromkeys(QUESTION.split(), 1.0))
    first, again = run(model, asked(QUESTION), seed=1), run(model, asked(QUESTION), seed=1)
    assert first == again
    assert {run(model, asked(QUESTION), seed=s).text for s in range(6)} != {first.text}


@settings(max_examples=40, deadline=None)
@given(st.text(st.sampled_from("abcdef the.,:1 \n"), min_size=2, max_size=60))
def test_any_text_ends_within_its_limits(text: str) -> None:
    words = [w for w in text.split() if any(c.isalpha() for c in w)]
    if not text.strip():
        return
    found = run(Keyword(dict.fromkeys(words, 0.3)), asked(text))
    assert found.before and found.queries <= QUERIES
    assert found.edits <= max(1, math.floor(0.2 * len(text)))
    assert found.edits == 0 or found.text != text


def test_measurement_counts_items_and_mean_queries() -> None:
    of = [Attacked(before=True, after=True, queries=10), Attacked(before=True, after=False, queries=20, edits=2),
          Attacked(before=False, after=False), Attacked(before=True, after=True)]
    found = joined([Attack("a", "1", tuple(of[:2])), Attack("b", "2", tuple(of[2:]))])
    assert found.measurement.value("after_attack") == 0.5 and found.measurement["after_attack"].n == 4
    assert found.measurement.value("attack_queries") == 15 and found.measurement["attack_queries"].n == 2
    assert found.measurement.context == {"attacked": "a + b", "attacked_items": 2, "words_changed": 2}
    with pytest.raises(DataError, match="at least 1"):
        attack(Keyword({}), Letters(), asked("a b"), queries=0)  # type: ignore[arg-type]


def test_neighbouring_keys() -> None:
    assert (beside("q"), beside("s"), beside("M"), beside("é"), beside("-")) == ("w", "ad", "N", "", "")
    for letter in "".join(KEYS):
        assert all(letter in beside(other) for other in beside(letter))


def test_an_edit_that_outgrows_the_context_is_skipped() -> None:
    class Short(Keyword):
        def score(self, tokens: Sequence[int]) -> np.ndarray:
            if len(tokens) > room:
                raise DataError("the text does not fit the context; shorten it")
            return super().score(tokens)

    question = "a splendid film that nobody wanted to end"
    items = ChoiceSet("one", (Item((question,) * 2, (" y", " n"), 0),), by_length=False)
    room = len(question) + 1
    found = attack(Short({"splendid": 1.0}), Letters(), items).items[0]
    assert found.before and len(found.text) <= len(question) and found.queries > 0
    room -= 1
    with pytest.raises(DataError, match="context"):
        attack(Short({"splendid": 1.0}), Letters(), items)
