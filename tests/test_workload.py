"""Workloads: sizes as promised, the user's file, and what is wrong with it by line."""

import json
from pathlib import Path

import pytest

from fivefold import bundled
from fivefold.errors import DataError
from fivefold.testing.tiny import write_tokenizer
from fivefold.tokenizer import Tokenizer
from fivefold.workload import INSTRUCTIONS, LONG_PROMPT_TOKENS, QUESTIONS, Request, Workload


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 320)
    return Tokenizer(folder)


def test_chat_and_batch_are_the_same_questions(tokenizer: Tokenizer) -> None:
    chat, batch = Workload.load("chat", tokenizer), Workload.load("batch", tokenizer)
    assert (chat.batch, batch.batch) == (1, 8)
    assert chat.requests == batch.requests[:4]
    assert len(set(batch.requests)) == 8
    for request, question in zip(batch.requests, QUESTIONS, strict=True):
        assert tokenizer.decode(request.prompt) == f"user: {question}\nassistant:"
        assert request.max_tokens == 48


def test_summarize_fills_long_prompts_with_real_text(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = {f"T{i}": {"title": f"T{i}", "extract": f"Entry number {i} tells that a sea shell is a shell. " * 9}
               for i in range(40)}
    file = tmp_path / "encyclopedia.json"
    file.write_text(json.dumps(entries))
    monkeypatch.setattr(bundled, "fetch", lambda name: file)
    workload = Workload.load("summarize", tokenizer)
    assert len(workload.requests) == len(INSTRUCTIONS)
    texts = [tokenizer.decode(r.prompt) for r in workload.requests]
    for request, text, instruction in zip(workload.requests, texts, INSTRUCTIONS, strict=True):
        assert abs(len(request.prompt) - LONG_PROMPT_TOKENS) <= 8
        assert text.startswith(f"user: {instruction}\n\nT")
    assert len({text.split("\n\n")[1] for text in texts}) == len(texts)


def test_a_users_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    lines = [{"prompt": "fox", "max_tokens": 3}, {"messages": [{"role": "user", "content": "dog"}]}]
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    workload = Workload.load(file, tokenizer)
    assert workload.requests[0] == Request(tuple(tokenizer.encode("fox")), 3)
    assert tokenizer.decode(workload.requests[1].prompt) == "user: dog\nassistant:"
    assert workload.longest == max(len(r.prompt) + r.max_tokens for r in workload.requests)
    described = workload.describe()
    assert (described["name"], described["requests"], described["output_tokens_max"]) == ("mine", 2, 48)


@pytest.mark.parametrize(("line", "said"), [
    ("{", "not JSON"), ("[1]", "either"), ("{}", "either"), ('{"prompt": "a", "messages": []}', "either"),
    ('{"prompt": 3}', "must be text"), ('{"messages": "a"}', "must be text"), ('{"messages": []}', "empty"),
    ('{"messages": [{"role": "user"}]}', "role"), ('{"prompt": ""}', "0 tokens"),
    ('{"prompt": "a", "max_tokens": 0}', "max_tokens"), ('{"prompt": "a", "max_tokens": true}', "max_tokens"),
    ('{"prompt": "a", "max_tokens": "9"}', "max_tokens"),
])
def test_a_bad_line_is_named_by_its_number(tokenizer: Tokenizer, tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "fox"}\n' + line + "\n")
    with pytest.raises(DataError, match=f"line 2 of mine.jsonl.*{said}"):
        Workload.load(file, tokenizer)


def test_missing_empty_and_foreign_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="chat, summarize, batch"):
        Workload.load("chatt", tokenizer)
    file = tmp_path / "mine.jsonl"
    file.write_text("\n")
    with pytest.raises(DataError, match="no request"):
        Workload.load(file, tokenizer)
    file.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match="UTF-8"):
        Workload.load(file, tokenizer)


def test_scaled_keeps_the_first_requests_and_changes_the_digest(tokenizer: Tokenizer) -> None:
    batch = Workload.load("batch", tokenizer)
    short = batch.scaled(requests=2, max_tokens=5)
    assert short.requests == tuple(Request(r.prompt, 5) for r in batch.requests[:2])
    assert short.batch == 2
    assert short.describe()["digest"] != batch.describe()["digest"]
    assert batch.scaled(max_tokens=500).requests == batch.requests


@pytest.mark.slow
def test_sizes_with_the_real_tokenizer() -> None:
    try:
        tokenizer = Tokenizer(bundled.load("smollm2-135m").path)
    except DataError as error:
        pytest.skip(str(error))
    sizes = [len(r.prompt) for r in Workload.load("chat", tokenizer).requests]
    assert 48 <= min(sizes) <= max(sizes) <= 128
    assert all(1000 <= len(r.prompt) <= 1030 for r in Workload.load("summarize", tokenizer).requests)
