"""Workload: the traffic a model is measured under. No speed, energy or cost number exists without one.

Which technique wins depends on the traffic: decoding one stream reads every weight per token (bytes matter), a long
prompt is arithmetic (FLOP matter), a batch shares each read among its streams, and prompt lookup pays only where the
answer copies from the prompt. So there are three named workloads, and a user's own as JSON lines:

    chat        4 short questions in the model's chat template, 48 new tokens each, one at a time
    summarize   4 prompts of about 1,024 tokens, two to summarise and two to quote from (copy-heavy), 48 new tokens
    batch       8 such questions, decoded together

    {"prompt": "Once upon a time", "max_tokens": 32}
    {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from fivefold.errors import DataError
from fivefold.tokenizer import Tokenizer

NAMES = ("chat", "summarize", "batch")
OUTPUT_TOKENS = 48
CHAT_REQUESTS = 4
LONG_PROMPT_TOKENS = 1024
MAX_REQUESTS = 4096
MAX_LINE_CHARS = 4 << 20
MAX_PROMPT_TOKENS = 1 << 20

QUESTIONS = (
    "I want to grow tomatoes on a small balcony that faces east and gets about five hours of sun a day. Which kind"
    " should I choose, how large must the pots be, and how often should I water them in July?",
    "Explain to a ten-year-old why the sky is blue during the day and red in the evening. Use one everyday comparison"
    " and avoid any formula.",
    "My train leaves at 14:35 and the trip takes two hours and fifty minutes, but there is a delay of a quarter of an"
    " hour. When do I arrive, and can I still make an appointment at six?",
    "Write a short and polite message to my neighbour: her dog barks every night after eleven, I have to get up at"
    " five, and I would like to find a solution together over a cup of tea.",
    "What is the difference between a virus and a bacterium, and why does an antibiotic help against only one of the"
    " two? Please answer in four or five sentences.",
    "Give me three ideas for a rainy Saturday with two children of six and nine years, without any screen and without"
    " buying anything new.",
    "In Python, how do I read a text file line by line and count how often each word occurs, ignoring upper and lower"
    " case? Show a short example and say what it prints.",
    "I was asked to give a toast at the wedding of my oldest friend. We met at school, he taught me to sail, and he"
    " met his wife on my boat. Suggest an opening and a closing sentence.",
)
INSTRUCTIONS = (
    "Summarize the following encyclopedia entries in three sentences.",
    "Quote the first entry below word for word, then the second.",
    "Which subjects do the following entries treat? Write one sentence about each.",
    "Copy the entries below unchanged, and correct spelling mistakes if there are any.",
)


@dataclass(frozen=True, slots=True)
class Request:
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """`batch` requests are decoded together (1: one after the other). `text` says in one sentence what this is."""

    name: str
    requests: tuple[Request, ...]
    batch: int
    text: str

    @classmethod
    def load(cls, name_or_path: str | Path, tokenizer: Tokenizer) -> Workload:
        """A named workload, or a JSON-lines file of the user's. Raises DataError with the number of the bad line."""
        name = str(name_or_path)
        if name == "chat":
            return cls(name, _questions(tokenizer)[:CHAT_REQUESTS], 1, "4 short questions, one at a time")
        if name == "batch":
            return cls(name, _questions(tokenizer), len(QUESTIONS), "8 short questions, decoded together")
        if name == "summarize":
            return cls(name, _long_prompts(tokenizer), 1, "4 long prompts to summarise or quote from, one at a time")
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise DataError(f"there is no workload {name!r}; name one of {', '.join(NAMES)} or a .jsonl file")
        return cls(path.stem, _user_requests(path, tokenizer), 1, f"{path.name}, one at a time")

    def scaled(self, requests: int | None = None, max_tokens: int | None = None) -> Self:
        """A shorter version for screening: the first `requests`, at most `max_tokens` new tokens each."""
        kept = self.requests[: max(1, requests)] if requests is not None else self.requests
        if max_tokens is not None:
            kept = tuple(replace(r, max_tokens=max(1, min(r.max_tokens, max_tokens))) for r in kept)
        return replace(self, requests=kept, batch=min(self.batch, len(kept)), text=f"{self.text} (shortened)")

    @property
    def longest(self) -> int:
        """Tokens of context the longest request needs, its answer included."""
        return max(len(r.prompt) + r.max_tokens for r in self.requests)

    def describe(self) -> dict[str, Any]:
        """What a reader needs: sizes in tokens (median and largest) and a digest of the exact token ids."""
        prompts = [len(r.prompt) for r in self.requests]
        outputs = [r.max_tokens for r in self.requests]
        ids = json.dumps([[*r.prompt, r.max_tokens] for r in self.requests]).encode()
        return {
            "name": self.name, "text": self.text, "requests": len(self.requests), "batch": self.batch,
            "prompt_tokens": statistics.median(prompts), "prompt_tokens_max": max(prompts),
            "output_tokens": statistics.median(outputs), "output_tokens_max": max(outputs),
            "digest": hashlib.sha256(ids).hexdigest()[:16],
        }


def _ask(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.chat([{"role": "user", "content": text}]))


def _questions(tokenizer: Tokenizer) -> tuple[Request, ...]:
    return tuple(Request(_ask(tokenizer, question), OUTPUT_TOKENS) for question in QUESTIONS)


def _long_prompts(tokenizer: Tokenizer) -> tuple[Request, ...]:
    from fivefold import bundled

    entries = json.loads(bundled.fetch("encyclopedia").read_text(encoding="utf-8")).values()
    order = sorted(entries, key=lambda e: hashlib.sha256(str(e["title"]).encode()).digest())
    texts = iter([f"{e['title']}: {' '.join(e['extract'].split())}" for e in order if len(e["extract"]) > 200])
    requests = []
    for instruction in INSTRUCTIONS:
        parts = [instruction]
        room = LONG_PROMPT_TOKENS - len(_ask(tokenizer, instruction))
        while room > 0:
            ids = tokenizer.encode("\n\n" + next(texts))[:room]
            parts.append(tokenizer.decode(ids))
            room -= len(ids)
        requests.append(Request(_ask(tokenizer, "".join(parts)), OUTPUT_TOKENS))
    return tuple(requests)


def _user_requests(path: Path, tokenizer: Tokenizer) -> tuple[Request, ...]:
    requests: list[Request] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_CHARS + 1), ""), start=1):
                where = f"line {number} of {path.name}"
                if len(line) > MAX_LINE_CHARS:
                    raise DataError(f"{where} is longer than {MAX_LINE_CHARS >> 20} Mi characters; split it")
                if line.strip():
                    requests.append(_user_request(line, where, tokenizer))
                if len(requests) > MAX_REQUESTS:
                    raise DataError(f"{path.name} holds more than {MAX_REQUESTS} requests; shorten it")
    except UnicodeDecodeError:
        raise DataError(f"{path.name} is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    if not requests:
        raise DataError(f'{path.name} holds no request; write lines like {{"prompt": "Hello", "max_tokens": 32}}')
    return tuple(requests)


def _user_request(line: str, where: str, tokenizer: Tokenizer) -> Request:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise DataError(f"{where} is not JSON; write one object per line") from None
    if not isinstance(row, Mapping) or ("prompt" in row) == ("messages" in row):
        raise DataError(f'{where} needs either "prompt" or "messages"; correct it')
    max_tokens = row.get("max_tokens", OUTPUT_TOKENS)
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or not 1 <= max_tokens <= MAX_PROMPT_TOKENS:
        raise DataError(f"{where}: max_tokens is {str(max_tokens)[:40]}, not a whole number of at least 1; correct it")
    prompt = row.get("prompt", "")
    if not isinstance(prompt, str) or ("messages" in row and not isinstance(row["messages"], list)):
        raise DataError(f"{where}: prompt must be text and messages a list; correct it")
    try:
        ids = tokenizer.encode(prompt) if "prompt" in row else tokenizer.chat(row["messages"])
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if not 1 <= len(ids) <= MAX_PROMPT_TOKENS:
        raise DataError(f"{where}: the prompt has {len(ids)} tokens; give 1 to {MAX_PROMPT_TOKENS}")
    return Request(tuple(ids), max_tokens)
