"""Splits that never overlap, windows of exact size, and files that cannot be used."""

import json
from itertools import chain
from pathlib import Path

import pytest

from fivefold import bundled
from fivefold.errors import DataError
from fivefold.tasks.text import documents, windows
from fivefold.testing.tiny import write_tokenizer
from fivefold.tokenizer import Tokenizer

SPLITS = ("calibration", "evaluation", "screen")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 320)
    return Tokenizer(folder)


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def test_splits_are_disjoint_complete_and_independent_of_order(tmp_path: Path) -> None:
    texts = [f"document {i} with words" for i in range(100)]
    file = jsonl(tmp_path / "a.jsonl", [*texts, texts[3]])
    parts = [documents(file, split) for split in SPLITS]  # type: ignore[arg-type]
    assert [len(p) for p in parts] == [40, 50, 10]
    assert sorted(chain(*parts)) == sorted(texts)
    turned = jsonl(tmp_path / "b.jsonl", texts[::-1])
    assert [documents(turned, split) for split in SPLITS] == parts  # type: ignore[arg-type]


def test_a_long_text_is_cut_into_blocks_that_add_up(tmp_path: Path) -> None:
    text = "".join(f"line {i} of the text\n" * (i % 7 + 1) for i in range(900)) + "".join(map(str, range(2500)))
    file = tmp_path / "a.txt"
    file.write_text(text)
    blocks = list(chain(*(documents(file, split) for split in SPLITS)))  # type: ignore[arg-type]
    assert sum(map(len, blocks)) == len(text)
    assert max(map(len, blocks)) < 4000


def test_the_encyclopedia_is_dealt_out_by_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {str(i): {"title": f"T{i}", "extract": f"text {i}" if i else "  "} for i in range(21)}
    file = tmp_path / "encyclopedia.json"
    file.write_text(json.dumps(entries))
    monkeypatch.setattr(bundled, "fetch", lambda name: file)
    found = list(chain(*(documents("encyclopedia", split) for split in SPLITS)))  # type: ignore[arg-type]
    assert sorted(found) == sorted(f"text {i}" for i in range(1, 21))


def test_windows_are_exact_and_follow_the_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [f"number {i} sells sea shells" for i in range(200)])
    found = windows(tokenizer, file, "evaluation", tokens=300, window=64)
    assert [len(w) for w in found] == [64] * 4
    whole = "".join(f"{text}\n\n" for text in documents(file, "evaluation"))
    assert list(chain(*found)) == tokenizer.encode(whole)[:256]


def test_every_window_starts_with_bos_where_the_model_wants_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [f"number {i} sells sea shells" for i in range(200)])
    plain = windows(tokenizer, file, "evaluation", tokens=126, window=63)
    with_bos = Tokenizer.__new__(Tokenizer)
    with_bos.__dict__ = {**tokenizer.__dict__, "bos": 0}
    found = windows(with_bos, file, "evaluation", tokens=128, window=64)
    assert found == [[0, *w] for w in plain]


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.txt", b"", "no text"), ("a.txt", b" \n", "no text"), ("a.txt", b"\xff\xfe\x00", "UTF-8"),
    ("a.jsonl", b"{", "line 1"), ("a.jsonl", b'{"text": "a"}\n{"txt": 1}', "line 2"), ("a.txt", b"short", "tokens"),
])
def test_unusable_files_are_told_in_one_sentence(
    tokenizer: Tokenizer, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        windows(tokenizer, tmp_path / name, "calibration")


def test_unknown_names_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="encyclopedia"):
        documents("encyclopaedia", "screen")
    with pytest.raises(DataError, match="split"):
        documents("encyclopedia", "train")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least 2"):
        windows(tokenizer, "encyclopedia", "screen", tokens=5, window=1)
