"""Multiple choice against a model whose answer is known, loyalty against scipy, and the sets against their rows."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from fivefold.errors import DataError, NotFinite
from fivefold.tasks import choice
from fivefold.tasks.choice import Answers, ChoiceSet, Item, answer, joined, load, names
from fivefold.tasks.loyalty import js_distance, loyalty, per_item
from fivefold.testing.tiny import write_tokenizer
from fivefold.tokenizer import Tokenizer

ROWS = {
    "piqa": ({"goal": "To dry", "sol1": "use a towel", "sol2": "use water", "label": 0},
             "Question: To dry\nAnswer: use a towel"),
    "arc-easy": ({"question": "Which?", "choices": {"text": ["no", "this"], "label": ["1", "2"]}, "answerKey": "2"},
                 "Question: Which?\nAnswer: this"),
    "openbookqa": ({"question_stem": "A fish can", "choices": {"text": ["swim", "fly"], "label": ["A", "B"]},
                    "answerKey": "A"}, "A fish can swim"),
    "hellaswag": ({"activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "label": "1",
                   "endings": ["flies.", "[step] is  working."]}, "Roof: A man sits. He is working."),
    "sst2": ({"sentence": "a charming journey . ", "label": 1}, "Review: a charming journey .\nSentiment: positive"),
    "boolq": ({"passage": "Ice floats.", "question": "does ice float", "answer": True},
              "Ice floats.\nQuestion: does ice float?\nAnswer: yes"),
    "sciq": ({"support": "", "question": "Who?", "distractor1": "a", "distractor2": "b", "distractor3": "c",
              "correct_answer": "darwin"}, "Question: Who?\nAnswer: darwin"),
    "winogrande": ({"sentence": "Ann beat Eve so _ won.", "option1": "Ann", "option2": "Eve", "answer": "1"},
                   "Ann beat Eve so Ann won."),
    "copa": ({"premise": "The man turned on the tap.", "choice1": "It broke.", "choice2": "Water flowed.",
              "question": "effect", "label": 1}, "The man turned on the tap so water flowed."),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 320)
    return Tokenizer(folder)


class Unigram:
    """Every token has the same log-probability wherever it stands."""

    def __init__(self, tokenizer: Tokenizer, liked: str = "", seed: int = 0) -> None:
        weights = np.random.default_rng(seed).random(tokenizer.vocab) + 0.1
        weights[tokenizer.encode(liked)] += 50
        self.vocab = tokenizer.vocab
        self.logp = np.log(weights / weights.sum()).astype(np.float32)

    def score(self, tokens: Sequence[int]) -> np.ndarray:
        return np.tile(self.logp, (len(tokens), 1))


@pytest.mark.parametrize("name", ROWS)
def test_each_set_spells_the_right_answer(name: str) -> None:
    row, want = ROWS[name]
    item = choice._modules()[name].item(row)
    assert item.contexts[item.answer] + item.continuations[item.answer] == want
    assert len(item.contexts) == len(item.continuations) >= 2


def test_every_set_is_fetchable() -> None:
    from fivefold import bundled

    assert set(names()) <= set(bundled.names())
    assert set(ROWS) | {"arc-challenge"} == set(names())


def test_the_score_is_the_sum_over_the_answers_own_tokens(tokenizer: Tokenizer) -> None:
    model = Unigram(tokenizer)
    items = ChoiceSet("t", (Item.of("the quick", ["brown fox", "dog"], 0),), by_length=False)
    sums = [model.logp[tokenizer.encode("the quick" + c)[len(tokenizer.encode("the quick")):]].sum()
            for c in (" brown fox", " dog")]
    want = np.exp(sums) / np.exp(sums).sum()
    found = answer(model, tokenizer, items)
    assert np.allclose(found.probabilities[0], want, rtol=1e-5)
    per_byte = np.array(sums) / [10, 4]
    normalised = answer(model, tokenizer, ChoiceSet("t", items.items)).probabilities[0]
    assert np.allclose(normalised, np.exp(per_byte * 7) / np.exp(per_byte * 7).sum(), rtol=1e-5)


def test_answers_of_one_token_are_scored_once(tokenizer: Tokenizer) -> None:
    class Counted(Unigram):
        calls = 0

        def score(self, tokens: Sequence[int]) -> np.ndarray:
            self.calls += 1
            return super().score(tokens)

    model = Counted(tokenizer)
    one, two = tokenizer.encode(" the"), tokenizer.encode(" a")
    assert len(one) == len(two) == 1
    found = answer(model, tokenizer, ChoiceSet("t", (Item.of("fox", ["the", "a"], 0),), by_length=False))
    assert model.calls == 1
    assert np.log(found.probabilities[0][0] / found.probabilities[0][1]) == pytest.approx(
        float(model.logp[one[0]] - model.logp[two[0]]), rel=1e-4)
    answer(model, tokenizer, ChoiceSet("t", (Item.of("fox", ["the sea", "a"], 0),)))
    assert model.calls == 3


def test_a_model_that_likes_the_answers_gets_them_right(tokenizer: Tokenizer) -> None:
    items = ChoiceSet("t", tuple(Item.of("the", ["sea sea", "fox fox"], i % 2) for i in range(10)))
    found = answer(Unigram(tokenizer, liked=" sea"), tokenizer, items)
    assert found.predictions.tolist() == [0] * 10
    assert found.correct.sum() == 5
    quantity = found.measurement["accuracy"]
    assert (quantity.value, quantity.n) == (0.5, 10)
    assert quantity.low == pytest.approx(0.2366, abs=1e-3)


def test_nan_is_a_typed_failure(tokenizer: Tokenizer) -> None:
    model = Unigram(tokenizer)
    model.logp[:] = np.nan
    with pytest.raises(NotFinite):
        answer(model, tokenizer, ChoiceSet("t", (Item.of("the", ["sea", "fox"], 0),)))


def test_a_users_file_and_its_order(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "choices": ["a", "b", "c"], "answer": "b" if i % 2 else 2} for i in range(20)]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    whole = load(file)
    assert sorted(i.answer for i in whole.items) == [1] * 10 + [2] * 10
    assert load(file, 5).items == whole.items[:5]
    file.write_text("\n".join(map(json.dumps, rows[::-1])))
    assert load(file) == whole


@pytest.mark.parametrize(("line", "said"), [
    ("{", "not JSON"), ("[]", "not a JSON object"), ("{}", "question"), ('{"question": "q"}', "choices"),
    ('{"question": "q", "choices": ["a"], "answer": 0}', "2 to"),
    ('{"question": "q", "choices": ["a", ""], "answer": 0}', "2 to"),
    ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "answer"),
    ('{"question": "q", "choices": ["a", "b"], "answer": "c"}', "answer"),
    ('{"question": "q", "choices": ["a", "b"], "answer": true}', "answer"),
])
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}\n' + line)
    with pytest.raises(DataError, match=f"line 2.*{said}"):
        load(file)
    with pytest.raises(DataError, match="piqa"):
        load("piqaa")


def test_js_distance_equals_scipy() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        p, q = random.dirichlet([0.3] * 5), random.dirichlet([0.3] * 5)
        assert js_distance(p, q) == pytest.approx(jensenshannon(p, q, 2))
    assert js_distance([1, 0], [0, 1]) == 1
    assert js_distance([0.5, 0.5], [0.5, 0.5]) == 0


def test_loyalty_of_known_answers() -> None:
    def of(*rows: list[float]) -> Answers:
        return Answers("t", "d", tuple(np.array(r) for r in rows), np.zeros(len(rows), np.int64))

    parent, copy = of([0.9, 0.1], [0.2, 0.8], [1, 0]), of([0.9, 0.1], [0.6, 0.4], [0, 1])
    found = loyalty(parent, copy)
    assert found.value("label_loyalty") == pytest.approx(1 / 3)
    assert np.allclose(per_item(parent, copy), [1, 1 - jensenshannon([0.2, 0.8], [0.6, 0.4], 2), 0])
    assert loyalty(parent, parent).value("probability_loyalty") == 1
    with pytest.raises(DataError, match="different items"):
        loyalty(parent, Answers("t", "other", parent.probabilities, parent.right))


def test_questions_and_answers_survive_a_file(tokenizer: Tokenizer) -> None:
    items = tuple(Item.of(f"q{i}", ["sea shells", "fox", "a hill"], i % 3) for i in range(6))
    asked = ChoiceSet("mine", items, by_length=False)
    again = ChoiceSet.from_json(json.loads(json.dumps(asked.to_json())))
    assert again == asked and again.digest == asked.digest
    found = answer(Unigram(tokenizer), tokenizer, asked)
    read = Answers.from_json(json.loads(json.dumps(found.to_json())))
    assert (read.name, read.digest) == (found.name, found.digest)
    assert np.array_equal(read.correct, found.correct) and np.array_equal(read.right, found.right)
    assert all(np.array_equal(a, b) for a, b in zip(read.probabilities, found.probabilities, strict=True))


def test_answers_to_two_sets_are_pooled_item_by_item() -> None:
    first = Answers("a", "1", (np.array([0.9, 0.1]), np.array([0.2, 0.8])), np.array([0, 0]))
    second = Answers("b", "2", (np.array([0.1, 0.2, 0.7]),), np.array([2]))
    both = joined([first, second])
    assert both.name == "a + b" and both.correct.tolist() == [True, False, True]
    assert joined([first]) is first and joined([second, first]).digest != both.digest
