"""Files of examples: what is learned of them, and what is refused, by line."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fivefold.errors import DataError
from fivefold.model import Model
from fivefold.testing.contract import sentence
from fivefold.testing.tiny import END, write_tokenizer
from fivefold.tokenizer import Tokenizer
from fivefold.training.data import Example, Examples, read

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
def bytewise(tiny_llama: Model) -> Tokenizer:
    return Tokenizer(tiny_llama.path)


@pytest.fixture
def chatml(tiny_llama: Model, tmp_path: Path) -> Tokenizer:
    return tokenizer_with(CHATML, tiny_llama, tmp_path / "chatml")


@pytest.fixture
def file(tmp_path: Path, bytewise: Tokenizer) -> Write:
    """file(content, name="rows.jsonl", **more): the examples in it; rows may be given as objects."""

    def read_it(content: Any, name: str = "rows.jsonl", **more: Any) -> Examples:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return read(tmp_path / name, more.pop("tokenizer", bytewise), more.pop("context", 256), **more)

    return read_it


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


GOOD = '{"text": "x", "label": "a"}\n'


def test_rows_nested_as_deeply_as_json_allows(file: Write) -> None:
    ends = set()
    for depth in range(400, 1400):
        try:
            file('{"messages": [{"role": "assistant", "content": "a", "x": %s}]}' % ("[" * depth + "]" * depth))
            ends.add("read")
        except DataError as error:
            ends.add(sentence(error).split(";")[0])
    assert ends >= {"read", "line 1 of rows.jsonl is not JSON"}


@pytest.mark.parametrize(("content", "name", "needle"), [
    (b"", "a.jsonl", "a.jsonl holds no rows"), (b"\n \n", "a.jsonl", "holds no rows"),
    (b"text,label\n", "a.csv", "holds no rows"), (b"", "a.csv", "has the columns none"),
    (b"text;label\nx;a\n", "a.csv", "has the columns text;label"),
    (GOOD + "{", "a.jsonl", "line 2 of a.jsonl is not JSON"), (GOOD + "[1]", "a.jsonl", "line 2 of a.jsonl is not a"),
    (GOOD + "9" * 5000, "a.jsonl", "line 2"), (GOOD + "[" * 5000, "a.jsonl", "line 2"),
    (GOOD + '{"text": "x"}', "a.jsonl", 'line 2 of a.jsonl has no "label"'),
    (GOOD + '{"text": 3, "label": "a"}', "a.jsonl", 'line 2 of a.jsonl has no text as "text"'),
    (GOOD + '{"prompt": "x"}', "a.jsonl", 'line 2 of a.jsonl has no "completion"'),
    (GOOD + '{"prompt": "x", "completion": " "}', "a.jsonl", 'line 2 of a.jsonl has an empty "completion"'),
    (GOOD + '{"prompt": "x", "completion": "y"}', "a.jsonl", "line 2 of a.jsonl has no label and others have"),
    (GOOD + '{"messages": []}', "a.jsonl", "line 2 of a.jsonl has no assistant message"),
    (GOOD + '{"messages": 7}', "a.jsonl", "line 2 of a.jsonl has no assistant message"),
    ('{"messages": [{"role": "assistant"}]}', "a.jsonl", "line 1 of a.jsonl: a message is not"),
    ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}', "a.jsonl",
     "line 1 of a.jsonl has an empty assistant message"),
    (GOOD * 2, "a.jsonl", "has the one label 'a'"),
    (GOOD + '{"prompt": "\\ud800", "completion": "y"}', "a.jsonl", "line 2 of a.jsonl: the text holds characters"),
    ('{"messages": [{"role": "assistant", "content": "\\udfff"}]}', "a.jsonl", "line 1 of a.jsonl: the text holds"),
    (GOOD + '{"text": "%s", "label": "b"}' % ("x" * 300), "a.jsonl", "line 2 of a.jsonl is 310 tokens long"),
    (b"\xff\xfe" + GOOD.encode(), "a.jsonl", "a.jsonl is not UTF-8"),
    ("text,label\nx,a\nhello, world,b\n", "a.csv", "line 3 of a.csv has 3 cells"),
    ("text,label\nx,a\nlonely\n", "a.csv", "line 3 of a.csv has 1 cells"),
    ('text,label\nx,a\n"never closed,b\ny,b\n', "a.csv", "line 3 of a.csv is not CSV"),
])
def test_what_is_wrong_is_said_with_its_line(
    tmp_path: Path, bytewise: Tokenizer, content: bytes | str, name: str, needle: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read(tmp_path / name, bytewise, 256)
    assert needle in sentence(caught.value)


def test_a_label_training_did_not_see(file: Write) -> None:
    rows = [{"text": "x", "label": "a"}, {"text": "y", "label": "c"}]
    assert file(rows[:1], labels=("a", "b")).labels == ("a", "b")
    with pytest.raises(DataError, match=r"^line 2 of rows.jsonl has the label 'c'.*labels: a, b$"):
        file(rows, labels=("a", "b"))


def test_a_row_may_fill_the_context(file: Write) -> None:
    row = {"prompt": "x" * 200, "completion": "y" * 55}
    assert file([row]).longest == 256
    with pytest.raises(DataError, match="257 tokens long and the model's context is 256"):
        file([{**row, "completion": "y" * 56}])


def test_a_limit_reads_no_further(file: Write) -> None:
    assert len(file('{"prompt": "x", "completion": "y"}\n' * 3 + "broken", limit=3)) == 3


def test_files_that_cannot_be_read(tmp_path: Path, bytewise: Tokenizer) -> None:
    for path, needle in ((tmp_path / "absent.jsonl", "No such file"), (tmp_path, "is not a file"),
                         (Path("/dev/zero"), "is not a file")):
        with pytest.raises(DataError) as caught:
            read(path, bytewise, 256)
        assert needle in sentence(caught.value)
    shut = tmp_path / "shut.jsonl"
    shut.write_text(GOOD)
    shut.chmod(0)
    was = os.geteuid()
    try:
        if was == 0:
            os.seteuid(65534)
        with pytest.raises(DataError, match="Permission denied"):
            read(shut, bytewise, 256)
    finally:
        os.seteuid(was)


NEARLY = st.text(max_size=5) | st.sampled_from(["a", "b", " ", "\ud800"])
TURNS = st.fixed_dictionaries({"role": st.sampled_from(["assistant", "user", "x"]), "content": NEARLY})
SHAPED = st.one_of(
    st.fixed_dictionaries({"text": NEARLY, "label": NEARLY}),
    st.fixed_dictionaries({"prompt": NEARLY, "completion": NEARLY}),
    st.fixed_dictionaries({"messages": st.lists(TURNS, max_size=3)}),
)
ROWS = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8)
    | st.sampled_from(["assistant", "user", "\ud800", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["messages", "prompt", "completion", "text", "label", "role", "content"]), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(ROWS | SHAPED, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
       | st.binary(max_size=60) | st.text('tex,lab"\n\r{}[]:1\\ud', max_size=60).map(str.encode),
       name=st.sampled_from(["f.jsonl", "f.csv"]), table=st.booleans())
def test_any_content_is_read_or_refused_in_one_sentence(
    tmp_path: Path, bytewise: Tokenizer, content: bytes, name: str, table: bool
) -> None:
    (tmp_path / name).write_bytes(b"text,label\n" * table + content)
    try:
        found = read(tmp_path / name, bytewise, 64)
    except DataError as error:
        assert name in sentence(error)
    else:
        assert all(row.learn[1:].any() and len(row.tokens) == len(row.learn) <= 64 for row in found.rows)
        assert len({row.line for row in found.rows}) == len(found) >= 1
        assert all(row.tokens.dtype == np.int64 for row in found.rows)
