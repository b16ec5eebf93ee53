"""Judging: against a brute-force computation with transformers, and against hand-made answers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fivefold.errors import DataError, NotFinite
from fivefold.model import Model, load
from fivefold.study.judged import Exam, answered, judge
from fivefold.tasks.paired import Decision
from fivefold.testing import tiny_model
from fivefold.testing.contract import sentence
from fivefold.testing.tiny import tiny_examples
from fivefold.tokenizer import Tokenizer
from fivefold.training import data
from fivefold.weights import read_tensors, write_safetensors

TEMPLATE = "{text}\nLabel:"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(tiny_model(tmp_path_factory.mktemp("tiny") / "model", layers=2, context=128).path)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(tiny_model(tmp_path_factory.mktemp("other") / "model", layers=2, context=128, seed=5).path)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_examples(tmp_path_factory.mktemp("rows") / "rows.jsonl", 24)


def exam(model: Model, file: Path, task: str = "", test: Path | None = None, items: int = 100) -> Exam:
    held = data.read(file, Tokenizer(model.tokenizer_file), model.blueprint.context, template=TEMPLATE)
    return Exam.set(model, held, task, test, items=items, template=TEMPLATE)


class Brute:
    """transformers' own model and tokenizer, one text at a time, all logits."""

    def __init__(self, model: Model) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model.path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model.path)

    def log_p(self, text: str, answer: str, stop: bool) -> list[float]:
        """Of each token of the answer after the text, and of the token that ends it."""
        before, ids = self.tokenizer(text)["input_ids"], self.tokenizer(text + answer)["input_ids"]
        ids = [*ids, 0] if stop else ids
        with torch.no_grad():
            logs = torch.log_softmax(self.model(torch.tensor([ids])).logits[0].double(), -1)
        return [float(logs[i - 1, ids[i]]) for i in range(len(before), len(ids))]


def told(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_losses_and_accuracy_are_those_of_brute_force(tiny: Model, rows: Path) -> None:
    found = answered(tiny, exam(tiny, rows)).measurement
    brute = Brute(tiny)
    losses, right = [], []
    for row in told(rows):
        prompt = TEMPLATE.replace("{text}", row["text"])
        losses += [-x for x in brute.log_p(prompt, f" {row['label']}", stop=True)]
        sums = {label: sum(brute.log_p(prompt, f" {label}", stop=False)) for label in ("no", "yes")}
        right.append(max(sums, key=lambda label: sums[label]) == row["label"])
    assert found.value("loss") == pytest.approx(np.mean(losses), rel=1e-4)
    assert found.value("perplexity") == pytest.approx(math.exp(np.mean(losses)), rel=1e-3)
    assert found.value("accuracy") == np.mean(right) and 0 < np.mean(right) < 1
    assert found["loss"].n == len(losses) and found["accuracy"].n == 24


def test_the_interval_takes_rows_as_the_unit(tiny: Model, rows: Path) -> None:
    from scipy.stats import t

    told = answered(tiny, exam(tiny, rows))
    loss, each = told.measurement["loss"], np.concatenate(told.losses)
    sums = np.array([(row - each.mean()).sum() for row in told.losses])
    error = math.sqrt(24 / 23 * (sums**2).sum()) / len(each)
    assert loss.high - loss.value == pytest.approx(t.ppf(0.975, 23) * error)  # type: ignore[operator]
    one = answered(tiny, exam(tiny, rows, items=1)).measurement["loss"]
    assert one.value is not None and one.low is None and "one window" in one.reason


def test_the_sign_of_the_verdict(tiny: Model, other: Model, rows: Path) -> None:
    asked = exam(tiny, rows)
    a, b = answered(tiny, asked), answered(other, asked)
    there, back, same = judge(tiny, other, asked), judge(other, tiny, asked), judge(tiny, tiny, asked)
    gain = b.measurement.value("accuracy") - a.measurement.value("accuracy")  # type: ignore[operator]
    assert there.verdict is not None and back.verdict is not None and same.verdict is not None
    assert there.verdict.difference == pytest.approx(gain) and back.verdict.difference == pytest.approx(-gain)
    assert same.verdict.difference == 0 and there.parent.value("loss") == a.measurement.value("loss")
    assert there.card.value("loss") == b.measurement.value("loss")


def test_without_labels_the_verdict_is_on_the_loss(tiny: Model, other: Model, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"She sells {i}", "completion": f" shells {i}."}) + "\n"
                            for i in range(12)))
    asked = exam(tiny, file)
    assert asked.asked is None and str(asked) == "12 rows"
    judged = judge(tiny, other, asked)
    a, b = ([part.mean() for part in answered(m, asked).losses] for m in (tiny, other))
    assert judged.verdict is not None and judged.verdict.difference == pytest.approx(np.mean(a) - np.mean(b))
    better = np.mean(b) < np.mean(a)
    assert (judged.verdict.decision is Decision.ACCEPT) <= better


def test_a_single_item_gets_no_verdict(tiny: Model, rows: Path) -> None:
    assert judge(tiny, tiny, exam(tiny, rows, items=1)).verdict is None


def test_a_file_of_its_own_to_judge_by(tiny: Model, rows: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps({"text": f"a bad fox {i}", "label": "no"}) + "\n" for i in range(3)))
    asked = exam(tiny, rows, "accuracy", test)
    assert len(asked.rows) == 3 and asked.asked is not None and len(asked.asked.items[0].continuations) == 2
    test.write_text('{"text": "a fox", "label": "yes"}\n{"text": "a fox", "label": "maybe"}\n')
    with pytest.raises(DataError, match=r"line 2 of test.jsonl has the label 'maybe', which training") as caught:
        exam(tiny, rows, "accuracy", test)
    sentence(caught.value)


def test_rows_without_labels_have_no_accuracy(tiny: Model, rows: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"prompt": f"a {i}", "completion": " b"}) + "\n" for i in range(4)))
    for given in ((plain, "accuracy", None), (rows, "accuracy", plain)):
        with pytest.raises(DataError, match=r"plain.jsonl has no labels") as caught:
            exam(tiny, *given)
        sentence(caught.value)
    assert exam(tiny, rows, "", plain).asked is None
    assert exam(tiny, plain, "accuracy", rows).asked is not None


def test_free_texts_are_no_labels(tiny: Model, tmp_path: Path) -> None:
    file = tmp_path / "free.jsonl"
    file.write_text("".join(json.dumps({"text": f"a {i}", "label": f"answer {i}"}) + "\n" for i in range(80)))
    assert exam(tiny, file).asked is None
    with pytest.raises(DataError, match="80 labels") as caught:
        exam(tiny, file, "accuracy")
    sentence(caught.value)


def test_a_label_that_exceeds_the_context_is_told_before(tiny: Model, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    tokenizer = Tokenizer(tiny.tokenizer_file)
    text = "She sells sea shells. " * 40
    while len(tokenizer.encode(f"{text}\nLabel: no")) > 126:
        text = text[:-1]
    file.write_text(json.dumps({"text": text, "label": "no"}) + "\n"
                    + json.dumps({"text": "She", "label": "an answer of many words and numbers 1234567890"}) + "\n")
    with pytest.raises(DataError, match=r"line 1 of long.jsonl takes \d+ tokens with the answer 'an answer") as caught:
        exam(tiny, file)
    sentence(caught.value)


def test_a_named_task_is_asked_too(tiny: Model, rows: Path, tmp_path: Path) -> None:
    items = [{"question": f"How many, {i}?", "choices": ["one", "a few"], "answer": i % 2} for i in range(10)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, items)))
    asked = exam(tiny, rows, str(tmp_path / "mine.jsonl"), items=6)
    assert str(asked) == "6 rows, and 6 of mine"
    (tmp_path / "mine.jsonl").write_text(json.dumps({**items[0], "question": "word " * 200}))
    with pytest.raises(DataError, match="model's context is 128"):
        exam(tiny, rows, str(tmp_path / "mine.jsonl"))
    with pytest.raises(DataError, match="no task 'piqaa'"):
        exam(tiny, rows, "piqaa")


def test_tokens_and_the_longest_are_counted(tiny: Model, rows: Path) -> None:
    asked, tokenizer = exam(tiny, rows), Tokenizer(tiny.tokenizer_file)
    lengths = []
    for row in told(rows):
        prompt = TEMPLATE.replace("{text}", row["text"])
        lengths += [len(tokenizer.encode(f"{prompt} {label}")) for label in ("no", "yes")]
        lengths.append(len(tokenizer.encode(f"{prompt} {row['label']}")) + 1)
    assert (asked.tokens, asked.longest) == (sum(lengths), max(lengths))


def test_it_is_written_and_read_back(tiny: Model, rows: Path) -> None:
    one = exam(tiny, rows)
    other = Exam.from_json(json.loads(json.dumps(one.to_json())))
    assert (other.tokens, other.longest, other.asked, str(other)) == (one.tokens, one.longest, one.asked, str(one))
    for a, b in zip(one.rows, other.rows, strict=True):
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.learn, b.learn) and a.line == b.line
    a, b = (answered(tiny, e).measurement for e in (one, other))
    assert a.quantities == b.quantities


def test_rows_longer_than_the_run_plan_allows_are_judged(tiny: Model, rows: Path) -> None:
    narrow = tiny.but(run=replace(tiny.run, context=4))
    assert answered(narrow, exam(tiny, rows)).measurement.value("loss")


def test_probabilities_that_are_no_numbers(tiny: Model, rows: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny.path, tmp_path / "nan")
    tensors = {n: t.numpy() for n, t in read_tensors(tiny.path)}
    tensors["model.norm.weight"][0] = np.nan
    write_safetensors(tmp_path / "nan" / "model.safetensors", tensors)
    with pytest.raises(NotFinite) as caught:
        answered(load(tmp_path / "nan"), exam(tiny, rows))
    sentence(caught.value)
