"""Files of examples: what is learned of them, which part is held out, and where rows begin."""

from __future__ import annotations

import csv
import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fivefold.errors import DataError
from fivefold.model import Model
from fivefold.testing.tiny import END, write_tokenizer
from fivefold.tokenizer import Tokenizer
from fivefold.training.data import Example, Examples

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
FORGETS = "{% for m in messages[-2:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
Write = Callable[..., Examples]


def tokenizer_with(template: str, tiny_llama: Model, folder: Path) -> Tokenizer:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(tiny_llama.path / name, folder / name)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


@pytest.fixture
def chatml(tiny_llama: Model, tmp_path: Path) -> Tokenizer:
    return tokenizer_with(CHATML, tiny_llama, tmp_path / "chatml")


def said(tokenizer: Tokenizer, row: Example) -> tuple[str, str]:
    """(the whole text, the learned text) of an example."""
    return (tokenizer.decode(row.tokens.tolist(), specials=True),
            tokenizer.decode(row.tokens[row.learn].tolist(), specials=True))


def test_a_completion_is_learned_with_its_end(file: Write, bytewise: Tokenizer) -> None:
    rows = file([{"prompt": "2+2=", "completion": "4"}, {"prompt": "Größe?", "completion": " 3 µm\n"}])
    assert [said(bytewise, row) for row in rows.rows] == [
        ("2+2=4" + END, "4" + END), ("Größe? 3 µm\n" + END, " 3 µm\n" + END)]
    assert rows.labels == () and [row.line for row in rows.rows] == [1, 2]
    assert rows.longest == len("Größe? 3 µm\n".encode()) + 1
    assert rows.tokens == sum(len(row.tokens) for row in rows.rows)


def test_a_token_across_the_border_is_learned(file: Write, tmp_path: Path) -> None:
    (tmp_path / "bpe").mkdir()
    write_tokenizer(tmp_path / "bpe", 320)
    merging = Tokenizer(tmp_path / "bpe")
    assert len(merging.encode("second")) < len(merging.encode("sec")) + len(merging.encode("ond"))
    row = file([{"prompt": "one sec", "completion": "ond"}], tokenizer=merging).rows[0]
    whole, learned = said(merging, row)
    assert row.tokens.tolist() == [*merging.encode("one second"), 0] and whole == "one second" + END
    assert learned.endswith("ond" + END) and not row.learn[: len(merging.encode("one"))].any()


def test_labels_are_asked_for_with_the_template(file: Write, bytewise: Tokenizer) -> None:
    rows = [{"text": "fine {text}", "label": " good "}, {"text": "awful", "label": "bad"}]
    found = file(rows, template="Review: {text}\nMood:")
    assert found.labels == ("bad", "good")
    assert [(row.text, row.label) for row in found.rows] == [("fine {text}", "good"), ("awful", "bad")]
    assert said(bytewise, found.rows[0]) == ("Review: fine {text}\nMood: good" + END, " good" + END)
    assert said(bytewise, file(rows).rows[1]) == ("awful\nLabel: bad" + END, " bad" + END)
    for template in ("no place", "{text} and {text}"):
        with pytest.raises(DataError, match="must hold"):
            file(rows, template=template)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_chat_learns_each_answer_and_its_end_only(file: Write, chatml: Tokenizer) -> None:
    talk = [turn("system", "Be brief."), turn("user", "2+2?"), turn("assistant", "4"), turn("user", "3+3?"),
            turn("assistant", "\n6\n")]
    row = file([{"messages": talk}], tokenizer=chatml).rows[0]
    whole, learned = said(chatml, row)
    assert learned == "4<|im_end|>\n6\n<|im_end|>"
    assert whole == chatml.chat_text(talk, add_generation_prompt=False)
    assert row.tokens.tolist() == chatml.chat(talk, add_generation_prompt=False)
    unanswered = file([{"messages": [*talk, turn("user", "5+5?")]}], tokenizer=chatml).rows[0]
    assert said(chatml, unanswered)[1] == learned


def test_chat_without_a_template_still_learns_to_end(file: Write, bytewise: Tokenizer) -> None:
    talk = [turn("user", "2+2?"), turn("assistant", "4"), turn("user", "3+3?"), turn("assistant", "6")]
    whole, learned = said(bytewise, file([{"messages": talk}]).rows[0])
    assert whole == "user: 2+2?\nassistant: 4\nuser: 3+3?\nassistant: 6" + END
    assert learned == " 4 6" + END


def test_a_template_that_rewrites_or_refuses_is_named_by_line(
    file: Write, tiny_llama: Model, tmp_path: Path
) -> None:
    talk = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    forgets = tokenizer_with(FORGETS, tiny_llama, tmp_path / "forgets")
    with pytest.raises(DataError, match=r"^line 2 of rows.jsonl: the model's chat template rewrites"):
        file([{"messages": talk[:2]}, {"messages": talk}], tokenizer=forgets)
    strict = tokenizer_with("{{ raise_exception('roles must alternate') }}", tiny_llama, tmp_path / "strict")
    with pytest.raises(DataError, match=r"^line 1 of rows.jsonl: .*roles must alternate"):
        file([{"messages": talk}], tokenizer=strict)


def test_csv_rows_are_numbered_where_they_begin(file: Write) -> None:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerows([["id", "label", "text"], [1, "a", "one\ntwo, \"three\"\n"], [2, "b", "plain"]])
    content = out.getvalue() + "\r\n3,a,last\r\n"
    assert content.count("\r\n") == 5
    found = file(content, "rows.csv")
    assert [(row.line, row.text, row.label) for row in found.rows] == [
        (2, 'one\ntwo, "three"\n', "a"), (5, "plain", "b"), (7, "last", "a")]
    with pytest.raises(DataError, match=r"^line 8 of rows.csv has an empty"):
        file(content + '4,b,"  \n"\r\n', "rows.csv")


@pytest.mark.parametrize("change", [lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n"), lambda t: t[:-1]])
def test_byte_order_marks_and_line_ends_change_nothing(file: Write, change: Callable[[str], str]) -> None:
    lines = '{"text": "x", "label": "a"}\n\n{"text": "y", "label": "b"}\n'
    table = 'text,label\nx,a\n\n"y",b\n'
    for text, name in ((lines, "rows.jsonl"), (table, "rows.CSV")):
        plain, other = file(text, name), file(change(text), name)
        assert [(r.line, r.digest, r.tokens.tolist()) for r in plain.rows] == [
            (r.line, r.digest, r.tokens.tolist()) for r in other.rows]
        assert [(r.line, r.text) for r in plain.rows] == [
            (1 if name == "rows.jsonl" else 2, "x"), (3 if name == "rows.jsonl" else 4, "y")]


def test_the_held_out_part_depends_on_content_alone(file: Write) -> None:
    rows = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(60)]
    rows += rows[:20] + [{**row, "id": i} for i, row in enumerate(rows[:20])]
    train, held = file(rows).split(0.2)
    random.Random(1).shuffle(rows)
    again = file(rows).split(0.2)
    texts = [{r.text for r in part.rows} for part in (train, held)]
    assert [{r.text for r in part.rows} for part in again] == texts
    assert not texts[0] & texts[1] and len(texts[1]) == 12 and len(texts[0]) == 48
    assert len(train) + len(held) == len(rows)
    assert train.labels == held.labels == ("a", "b")
    for share in (0.0001, 0.9999):
        assert [len(part) for part in file([{"prompt": "a", "completion": c} for c in "bc"]).split(share)] == [1, 1]
    with pytest.raises(DataError, match="at least 2"):
        file([{"prompt": "a", "completion": "b"}] * 5).split(0.5)
