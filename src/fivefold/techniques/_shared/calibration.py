"""Calibration text: the tokens a technique looks at to learn what the weights are used for.

The text is the model's own calibration file (`model.calibration`, plain UTF-8), else the bundled encyclopedia leads,
of which only a part set aside for calibration is read, so that no measured text was ever looked at. Windows are
spread evenly over the text and never overlap. A few thousand tokens are enough for the mean square of a column: its
relative error falls as 1 / sqrt(tokens).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fivefold.errors import DataError, ModelError
from fivefold.model import Model

WINDOW = 512
MAX_BYTES = 64 << 20
SET_ASIDE = 4
CHARACTERS = 16
"""More than a token has of characters on average, so a piece of 16 per token is long enough."""


def windows(model: Model, count: int, length: int = WINDOW) -> NDArray[np.int64]:
    """Token ids, shape (count, min(length, the model's context)). Raises DataError when the text is too short."""
    length = min(length, model.blueprint.context)
    text, source = _text(model)
    pieces = [text] if len(text) <= 2 * CHARACTERS * count * length else _pieces(text, count, length)
    encoded = _encode(model, pieces)
    if len(pieces) == count and all(len(ids) >= length for ids in encoded):
        chosen = [ids[:length] for ids in encoded]
    else:
        ids = encoded[0] if len(encoded) == 1 else _encode(model, [text])[0]
        if len(ids) < count * length:
            raise DataError(
                f"{source} gives {len(ids)} tokens, and {count} calibration windows of {length} need"
                f" {count * length}; give a longer text or fewer windows"
            )
        chosen = [ids[i * len(ids) // count :][:length] for i in range(count)]
    out = np.array(chosen, np.int64)
    if out.max() >= model.blueprint.vocab:
        raise ModelError(
            f"{model.tokenizer_file} makes tokens outside the vocabulary of {model.blueprint.vocab};"
            " use the model's own"
        )
    return out


def up_to(model: Model, most: int, length: int = WINDOW) -> NDArray[np.int64]:
    """As many windows as the text has, `most` at most. Raises DataError when it has not one."""
    length = min(length, model.blueprint.context)
    text, _ = _text(model)
    if len(text) <= 2 * CHARACTERS * most * length:
        most = max(1, min(most, len(_encode(model, [text])[0]) // length))
    return windows(model, most, length)


def _pieces(text: str, count: int, length: int) -> list[str]:
    step = len(text) // count
    return [text[i * step :][: min(step, CHARACTERS * length)] for i in range(count)]


def _encode(model: Model, texts: list[str]) -> list[list[int]]:
    from fivefold.tokenizer import Tokenizer

    tokenizer = Tokenizer(model.tokenizer_file)
    return [tokenizer.encode(text) for text in texts]


def _text(model: Model) -> tuple[str, Path]:
    if model.calibration is None:
        return _encyclopedia()
    path = model.calibration
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} is larger than {MAX_BYTES >> 20} MiB; give a shorter calibration text")
        return path.read_text(encoding="utf-8"), path
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a readable calibration text") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; save the calibration text as UTF-8") from None


def _encyclopedia() -> tuple[str, Path]:
    from fivefold.bundled import fetch

    path = fetch("encyclopedia")
    leads = json.loads(path.read_text(encoding="utf-8")).values()
    return "\n\n".join(leads_set_aside({lead["title"]: lead["extract"] for lead in leads})), path


def leads_set_aside(leads: Mapping[str, str]) -> list[str]:
    """The texts for calibration, title -> text given: 4 of every 10 in the order of the titles' SHA-256.

    The rule of the tasks' "calibration" split, so that what is evaluated on was never looked at.
    """
    titles = sorted((t for t in leads if leads[t].strip()), key=lambda t: hashlib.sha256(t.encode()).digest())
    return [leads[title] for rank, title in enumerate(titles) if rank % 10 < SET_ASIDE]
