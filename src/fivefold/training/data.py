"""Training examples: a file of rows becomes token ids and a mark on those that are to be learned.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}      JSON lines
    {"prompt": "...", "completion": "..."}                                                        JSON lines
    {"text": "...", "label": "..."}                                           JSON lines, or CSV with these columns

The loss is on answers only: the assistant's turns with the token that ends them, the completion, the label. A prompt
and its answer are tokenised together and cut where the prompt's own tokens end, as they will be met when the model is
asked. A label is asked for with `template`, in which {text} is the row's text; the labels seen are the choices, in
name order. Other fields and columns are ignored.

The held-out part is chosen by a hash of what is learned of each row, so it is the same part in every order of the file,
and a row that occurs twice is on one side only.

Nothing in a file is executed. Every error names its line: where a row begins, for a CSV with line breaks in quotes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivefold.errors import DataError, ModelError
from fivefold.tokenizer import Tokenizer

MAX_BYTES = 2 << 30
TEMPLATE = "{text}\nLabel:"
SHAPES = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ..., "label": ...}'


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """`tokens` (length,) int64 and `learn` (length,) bool: the tokens whose loss counts. `line` is its place."""

    tokens: NDArray[np.int64]
    learn: NDArray[np.bool_]
    line: int
    digest: bytes
    text: str = ""
    label: str = ""


@dataclass(frozen=True, eq=False)
class Examples:
    """The rows of one file. `labels` are those seen, in name order (empty: the rows are not labelled)."""

    rows: tuple[Example, ...]
    labels: tuple[str, ...] = ()
    template: str = TEMPLATE
    source: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def longest(self) -> int:
        return max(len(row.tokens) for row in self.rows)

    @property
    def tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    def split(self, share: float) -> tuple[Examples, Examples]:
        """(training part, held-out part of about `share`, at least one row). Raises DataError for fewer than 2 rows."""
        ranked = sorted(self.rows, key=lambda row: row.digest)
        distinct = sorted({row.digest for row in ranked})
        if len(distinct) < 2:
            raise DataError(f"{self.source} holds {len(distinct)} distinct row; give at least 2")
        last = distinct[max(1, min(len(distinct) - 1, round(share * len(distinct)))) - 1]
        parts = ([r for r in self.rows if r.digest > last], [r for r in self.rows if r.digest <= last])
        return (Examples(tuple(parts[0]), self.labels, self.template, self.source),
                Examples(tuple(parts[1]), self.labels, self.template, self.source))


@dataclass
class _Reader:
    """Turns rows into examples; `where` is the sentence's start for an error."""

    tokenizer: Tokenizer
    template: str
    context: int
    name: str
    stop: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stop = sorted(self.tokenizer.stop)[:1]

    def example(self, row: Any, line: int) -> Example:
        where = f"line {line} of {self.name}"
        if not isinstance(row, dict):
            raise DataError(f"{where} is not a JSON object; write one of {SHAPES}")
        used: dict[str, Any]
        text = label = ""
        try:
            if "messages" in row:
                used = {"messages": row["messages"]}
                tokens, learn = self._chat(row["messages"], where)
            elif "prompt" in row or "completion" in row:
                used = {key: self._text(row, key, where) for key in ("prompt", "completion")}
                tokens, learn = self._pair(used["prompt"], used["completion"], where)
            else:
                used = {key: self._text(row, key, where) for key in ("text", "label")}
                text, label = used["text"], used["label"]
                tokens, learn = self._pair(self.template.replace("{text}", text), f" {label}", where)
            digest = hashlib.sha256(json.dumps(used, sort_keys=True).encode()).digest()
        except (DataError, ModelError, RecursionError) as error:
            raise DataError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
        if len(tokens) > self.context:
            raise DataError(f"{where} is {len(tokens)} tokens long and the model's context is {self.context};"
                            " shorten the row")
        if not any(learn[1:]):
            raise DataError(f"{where} has nothing to learn: its answer is empty; fill it in or remove the row")
        return Example(np.array(tokens, np.int64), np.array(learn, bool), line, digest, text, label)

    def _text(self, row: dict[str, Any], key: str, where: str) -> str:
        value = row.get(key)
        if not isinstance(value, str) or not value.strip():
            what = "has no" if value is None else "has an empty" if isinstance(value, str) else "has no text as"
            raise DataError(f'{where} {what} "{key}"; every row needs the shape {SHAPES}')
        return value.strip() if key == "label" else value

    def _pair(self, prompt: str, answer: str, where: str) -> tuple[list[int], list[bool]]:
        before, whole = self.tokenizer.encode(prompt), self.tokenizer.encode(prompt + answer)
        shared = _shared(before, whole)
        tokens = [*whole, *self.stop]
        if shared == 0:
            raise DataError(f"{where} has a prompt without a token; write at least one word")
        return tokens, [i >= shared for i in range(len(tokens))]

    def _chat(self, messages: Any, where: str) -> tuple[list[int], list[bool]]:
        messages = messages if isinstance(messages, list) else []
        answers = [i for i, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "assistant"]
        if not answers:
            raise DataError(f"{where} has no assistant message to learn; add one")
        tokens = self.tokenizer.chat(messages, add_generation_prompt=False)
        learn = [False] * len(tokens)
        for i in answers:
            if not messages[i]["content"].strip():
                raise DataError(f"{where} has an empty assistant message; fill it in or remove the row")
            before, after = self._said(messages[:i], True) if i else "", self._said(messages[: i + 1], False)
            if not self._said(messages, False).startswith(after) or not after.startswith(before):
                raise DataError(f"{where}: the model's chat template rewrites earlier turns, so its answers"
                                " cannot be told apart; use prompt and completion")
            asked = _shared(tokens, self.tokenizer.chat(messages[:i], True)) if i else 0
            end = _shared(tokens, self.tokenizer.chat(messages[: i + 1], False))
            ends = [at + 1 for at in range(asked, end) if tokens[at] in self.tokenizer.stop]
            end = ends[-1] if ends else end
            learn[asked:end] = [True] * (end - asked)
            if not ends and i == len(messages) - 1:
                return [*tokens, *self.stop], [*learn, *(True for _ in self.stop)]
        return tokens, learn

    def _said(self, messages: Any, asking: bool) -> str:
        return self.tokenizer.chat_text(messages, add_generation_prompt=asking)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def read(
    path: str | Path, tokenizer: Tokenizer, context: int, *, template: str = TEMPLATE,
    labels: Sequence[str] | None = None, limit: int | None = None,
) -> Examples:
    """The examples of a .jsonl or .csv file (see the module).

    `labels` are those allowed (a test file must not bring a new one). Raises DataError with the line.
    """
    path = Path(path).expanduser()
    if template.count("{text}") != 1:
        raise DataError(f"the template {template[:60]!r} must hold {{text}} once; write it like {TEMPLATE!r}")
    rows = _csv if path.suffix.lower() == ".csv" else _json_lines
    reader = _Reader(tokenizer, template, context, path.name)
    found: list[Example] = []
    for line, row in rows(_content(path), path.name):
        found.append(reader.example(row, line))
        if limit is not None and len(found) >= limit:
            break
    if not found:
        raise DataError(f"{path.name} holds no rows; write one of {SHAPES} per line")
    labelled = [row for row in found if row.label]
    if labelled and len(labelled) < len(found):
        odd = next(row for row in found if not row.label)
        raise DataError(f"line {odd.line} of {path.name} has no label and others have; give every row one")
    seen = tuple(sorted({row.label for row in labelled}))
    for row in labelled if labels is not None else ():
        if row.label not in (labels or ()):
            raise DataError(f"line {row.line} of {path.name} has the label {row.label[:40]!r}, which training did not"
                            f" see; labels: {', '.join(labels or ())[:200]}")
    if labelled and labels is None and len(seen) < 2:
        raise DataError(f"{path.name} has the one label {seen[0][:40]!r}; give rows of at least two labels")
    return Examples(tuple(found), tuple(labels) if labels is not None and labelled else seen, template, path.name)


def _content(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is not a file; give a .jsonl or .csv file")
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path.name} is larger than {MAX_BYTES >> 30} GiB; give a part of it")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    except UnicodeDecodeError:
        raise DataError(f"{path.name} is not UTF-8; save it as UTF-8") from None


def _json_lines(text: str, name: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(f"line {number} of {name} is not JSON; write one object per line") from None


def _csv(text: str, name: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(16 << 20)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        columns = next(reader, [])
        if not {"text", "label"} <= set(columns):
            raise DataError(f"{name} has the columns {', '.join(columns)[:100] or 'none'}; a CSV needs text and label")
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                if len(cells) != len(columns):
                    raise DataError(f"line {line} of {name} has {len(cells)} cells and the first line has"
                                    f" {len(columns)}; put texts with commas in quotes")
                yield line, dict(zip(columns, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"line {line} of {name} is not CSV ({error}); correct it") from None
