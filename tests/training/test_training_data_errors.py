"""Files of examples that cannot be used: refused in one sentence, with the line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fivefold.errors import DataError
from fivefold.testing.contract import sentence
from fivefold.tokenizer import Tokenizer
from fivefold.training.data import Examples, read

Write = Callable[..., Examples]
GOOD = '{"text": "x", "label": "a"}\n'


def test_rows_nested_as_deeply_as_json_allows(file: Write) -> None:
    ends = set()
    for depth in range(400, 1400, 7):
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
                         (Path("/dev/null"), "is not a file")):
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
