"""Dated tables of facts (TOML) that ship with the meters and that a user may override key by key."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fivefold.errors import UserError
from fivefold.paths import config_dir
from fivefold.space import nearest


def shipped(name: str) -> dict[str, Any]:
    """The book `name` (prices, power, grid) as it ships."""
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))


def overrides(name: str, file: Path | None = None) -> dict[str, Any]:
    """The user's own entries: from `file`, else FIVEFOLD_<NAME>, else the settings folder; {} when there are none."""
    variable = f"FIVEFOLD_{name.upper()}"
    named = file or (Path(os.environ[variable]).expanduser() if os.environ.get(variable) else None)
    file = named or config_dir() / f"{name}.toml"
    if not file.is_file():
        if named:
            raise UserError(f"{file} does not exist, so no {name} can be read from it; correct {variable}")
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file} is not readable TOML ({error}); correct it or delete it") from None


def number(book: str, key: str, value: Any, least: float = 0.0) -> float:
    """A finite number from a book, at least `least`; anything else is a UserError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
        raise UserError(f"the {book} book says {key} = {value!r}, which is not a number from {least:g}; correct it")
    return float(value)


def check_keys(book: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key in given:
        if key not in known:
            hint = nearest(key, list(known))
            raise UserError(
                f"the {book} book has no key {key!r}{f', did you mean {hint!r}' if hint else ''};"
                f" keys: {', '.join(sorted(known))}"
            )
