"""Texts to calibrate on, to screen with and to evaluate with, and never the same text for two of these.

A source is "encyclopedia" (10,033 English lead texts), "shakespeare" (plays and poems), or a user's own file: `.txt`
or `.jsonl` with {"text": ...} per line. It is taken as documents (a long text in blocks of about 2,000 characters).
Documents are put in the order of a hash of their title, or of their text where they have none, and dealt out by
rank: 4 of 10 to "calibration", 5 to "evaluation", 1 to "screen". So the splits are disjoint, the same on every
machine, and each of them is a random sample of the source. Equal documents are kept once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from fivefold.errors import DataError
from fivefold.tokenizer import Tokenizer

Split = Literal["calibration", "evaluation", "screen"]
SOURCES = ("encyclopedia", "shakespeare")
SHARES: dict[str, range] = {"calibration": range(4), "evaluation": range(4, 9), "screen": range(9, 10)}
BLOCK = 2000
MAX_FILE_BYTES = 1 << 30


def documents(source: str | Path, split: Split) -> list[str]:
    """The texts of one split, in hash order. Raises DataError with one sentence."""
    if split not in SHARES:
        raise DataError(f"there is no split {str(split)!r}; choose one of {', '.join(get_args(Split))}")
    keyed = dict(_keyed(source))
    order = sorted(keyed, key=lambda key: hashlib.sha256(key.encode("utf-8", "replace")).digest())
    return [keyed[key] for rank, key in enumerate(order) if rank % 10 in SHARES[split]]


def windows(
    tokenizer: Tokenizer, source: str | Path, split: Split, tokens: int = 2048, window: int = 512
) -> list[list[int]]:
    """`tokens // window` windows of exactly `window` token ids, documents joined by a blank line.

    Where the model wants BOS, each window starts with it. Raises DataError when the split is too short.
    """
    if window < 2 or tokens < window:
        raise DataError(f"{tokens} tokens in windows of {window} is no window of at least 2; ask for more tokens")
    wanted = tokens // window
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    size = window - len(bos)
    found: list[list[int]] = []
    waiting: list[int] = []
    for text in documents(source, split):
        waiting += tokenizer.encode(text.strip() + "\n\n")[len(bos) :]
        while len(waiting) >= size:
            found.append(bos + waiting[:size])
            waiting = waiting[size:]
            if len(found) == wanted:
                return found
    have = len(found) * size + len(waiting)
    raise DataError(
        f"the {split} part of {_name(source)} has {have} tokens and {wanted * window} were asked for;"
        " give a longer text or ask for fewer tokens"
    )


def _name(source: str | Path) -> str:
    return str(source) if str(source) in SOURCES else Path(source).name


def _keyed(source: str | Path) -> Iterator[tuple[str, str]]:
    """(what is hashed, text) of every document that is not blank."""
    from fivefold import bundled

    if str(source) == "encyclopedia":
        for entry in json.loads(bundled.fetch("encyclopedia").read_text(encoding="utf-8")).values():
            if entry["extract"].strip():
                yield entry["title"], entry["extract"]
        return
    path = bundled.fetch("shakespeare") if str(source) == "shakespeare" else Path(source).expanduser()
    texts = list(_lines(path)) if path.suffix == ".jsonl" else list(_blocks(_read(path)))
    if not texts:
        raise DataError(f"{path.name} holds no text; give a file that does")
    yield from ((text, text) for text in texts)


def _read(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"there is no text {str(path)!r}; name one of {', '.join(SOURCES)}, or a .txt or .jsonl file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"{path.name} is larger than {MAX_FILE_BYTES >> 30} GiB; give a part of it")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path.name} is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None


def _lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            raise DataError(f"line {number} of {path.name} is not JSON; write one object per line") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f'line {number} of {path.name} has no "text"; write lines like {{"text": "..."}}')
        if row["text"].strip():
            yield row["text"]


def _blocks(text: str) -> Iterator[str]:
    """Whole lines, about BLOCK characters at a time; a longer line is cut."""
    block = ""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), BLOCK):
            block += line[start : start + BLOCK]
            if len(block) >= BLOCK:
                yield block
                block = ""
    if block.strip():
        yield block
