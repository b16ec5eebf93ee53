"""Multiple choice: the model picks the answer to which it gives the highest log-likelihood.

Each choice is appended to the question and the log-probabilities of its tokens are added up. Long answers have small
products, so on most sets the sum is divided by the answer's length in bytes (which, unlike its length in tokens, does
not depend on the tokenizer). The probability of a choice is the softmax of these scores, multiplied by the mean
length of the item's choices so that they are again of the size of log-likelihoods; the most probable choice is the
prediction.

Sets come from files in `choice_sets` or from a user's JSON lines
{"question": "...", "choices": ["...", "..."], "answer": 0} where `answer` is the index or the text of the right one.
Items are taken in the order of a hash of their text, so the first n are a random sample, the same everywhere.

Source: Gao et al., lm-evaluation-harness (`acc_norm`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fivefold.engines import Session
from fivefold.errors import DataError, NotFinite
from fivefold.quantity import Measurement
from fivefold.tasks import _intervals
from fivefold.tokenizer import Tokenizer

MAX_CHOICES = 64
MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class Item:
    """Choice i is `continuations[i]` after `contexts[i]`; `answer` is the index of the right one."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    answer: int

    @classmethod
    def of(cls, question: str, choices: Sequence[str], answer: int) -> Self:
        """Choices after one question, separated by a space."""
        return cls((question,) * len(choices), tuple(f" {choice.strip()}" for choice in choices), answer)


@dataclass(frozen=True)
class ChoiceSet:
    name: str
    items: tuple[Item, ...]
    by_length: bool = True

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.items).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        items = [Item(tuple(i["contexts"]), tuple(i["continuations"]), i["answer"]) for i in data["items"]]
        return cls(data["name"], tuple(items), data["by_length"])


@dataclass(frozen=True, eq=False)
class Answers:
    """What one model answered. `probabilities[i]` has one value per choice of item i; `digest` names the items."""

    name: str
    digest: str
    probabilities: tuple[NDArray[np.float64], ...]
    right: NDArray[np.int64]

    @property
    def predictions(self) -> NDArray[np.int64]:
        return np.array([p.argmax() for p in self.probabilities])

    @property
    def correct(self) -> NDArray[np.bool_]:
        return self.predictions == self.right

    @property
    def measurement(self) -> Measurement:
        """Accuracy with Wilson's 95 % interval."""
        return Measurement({"accuracy": _intervals.proportion(self.correct)}, {"task": self.name, "items": self.digest})

    def to_json(self) -> dict[str, Any]:
        probabilities = [p.tolist() for p in self.probabilities]
        return {"name": self.name, "digest": self.digest, "probabilities": probabilities, "right": self.right.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        probabilities = tuple(np.array(p, np.float64) for p in data["probabilities"])
        return cls(data["name"], data["digest"], probabilities, np.array(data["right"], np.int64))


def joined(answers: Sequence[Answers]) -> Answers:
    """The answers to several sets as those to one: their items side by side."""
    if len(answers) == 1:
        return answers[0]
    digest = hashlib.sha256(" ".join(a.digest for a in answers).encode()).hexdigest()[:16]
    return Answers(
        " + ".join(a.name for a in answers), digest, tuple(p for a in answers for p in a.probabilities),
        np.concatenate([a.right for a in answers]),
    )


def same_items(parent: Answers, candidate: Answers) -> None:
    """Raises DataError when the two answered different items."""
    if parent.digest != candidate.digest:
        raise DataError(f"the two models answered different items of {parent.name}; answer the same items with both")


@functools.cache
def _modules() -> Mapping[str, ModuleType]:
    from fivefold.tasks import choice_sets

    found = pkgutil.iter_modules(choice_sets.__path__)
    loaded = [importlib.import_module(f"{choice_sets.__name__}.{info.name}") for info in found]
    return {name: module for module in loaded for name in module.SETS}


def names() -> list[str]:
    return sorted(_modules())


def load(name_or_path: str | Path, limit: int | None = None) -> ChoiceSet:
    """A set by name, or a user's .jsonl file; the first `limit` items in hash order. Raises DataError."""
    name = str(name_or_path)
    if limit is not None and limit < 1:
        raise DataError(f"{limit} items were asked for; ask for at least 1")
    if name in _modules():
        module = _modules()[name]
        return ChoiceSet(name, _first([module.item(row) for row in _arrow(name)], limit), module.BY_LENGTH)
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise DataError(f"there is no task {name!r}; name one of {', '.join(names())}, or a .jsonl file")
    return ChoiceSet(path.stem, _first(_user_items(path), limit))


def answer(session: Session, tokenizer: Tokenizer, items: ChoiceSet) -> Answers:
    """Score every choice of every item. Raises NotFinite when the model's scores are not numbers."""
    found = []
    for item in items.items:
        pairs = zip(item.contexts, item.continuations, strict=True)
        score = functools.cache(lambda tokens: session.score(list(tokens)))  # answers of one token share all before
        scores = np.array([_log_likelihood(score, tokenizer, *pair) for pair in pairs])
        if items.by_length:
            lengths = np.array([len(text.encode()) for text in item.continuations])
            scores = scores / lengths * lengths.mean()
        weights = np.exp(scores - scores.max())
        found.append(weights / weights.sum())
    return Answers(items.name, items.digest, tuple(found), np.array([i.answer for i in items.items]))


def _log_likelihood(
    score: Callable[[tuple[int, ...]], NDArray[np.float32]], tokenizer: Tokenizer, context: str, continuation: str
) -> float:
    """Sum of log p over the tokens of `continuation`; a token that spans both texts counts to it."""
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
    first = max(1, min(len(list(common)), len(whole) - 1))
    if len(whole) < 2:
        raise DataError(f"the question {context[:40]!r} is too short to be scored; give at least one word")
    scored = score(tuple(whole[:-1]))
    total = float(scored[np.arange(first - 1, len(whole) - 1), whole[first:]].sum(dtype=np.float64))
    if not np.isfinite(total):
        raise NotFinite("the model gives log-probabilities that are not numbers")
    return total


def _first(items: Sequence[Item], limit: int | None) -> tuple[Item, ...]:
    def key(item: Item) -> bytes:
        return hashlib.sha256(repr((item.contexts, item.continuations)).encode()).digest()

    return tuple(sorted(items, key=key)[:limit])


def _arrow(name: str) -> list[dict[str, Any]]:
    from pyarrow import ipc

    from fivefold import bundled

    with bundled.fetch(name).open("rb") as file:
        rows: list[dict[str, Any]] = ipc.open_stream(file).read_all().to_pylist()
    return rows


def _user_items(path: Path) -> list[Item]:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"{path.name} is larger than {MAX_FILE_BYTES >> 20} MiB; give a part of it")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise DataError(f"{path.name} is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    items = [_user_item(line, f"line {n} of {path.name}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not items:
        raise DataError(f"{path.name} holds no item; write one JSON object per line")
    return items


def _user_item(line: str, where: str) -> Item:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise DataError(f"{where} is not JSON; write one object per line") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is not a JSON object; write one object per line")
    question, choices, right = row.get("question"), row.get("choices"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f'{where} has no "question"; write {{"question": ..., "choices": [...], "answer": 0}}')
    if not isinstance(choices, list) or not 2 <= len(choices) <= MAX_CHOICES or not all(map(_is_text, choices)):
        raise DataError(f"{where}: choices must be 2 to {MAX_CHOICES} texts; correct it")
    if isinstance(right, str) and choices.count(right) == 1:
        right = choices.index(right)
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(choices):
        raise DataError(f"{where}: answer is {str(right)[:40]!r}, neither an index nor one of the choices; correct it")
    return Item.of(question, choices, right)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
