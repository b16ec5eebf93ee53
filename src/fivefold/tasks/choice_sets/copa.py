"""COPA: the more plausible cause or effect. Roemmele et al., AAAI Spring Symposium 2011."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fivefold.tasks.choice import Item

SETS = ("copa",)
BY_LENGTH = True


def item(row: Mapping[str, Any]) -> Item:
    link = {"cause": "because", "effect": "so"}[row["question"]]
    choices = [text[:1].lower() + text[1:] for text in (row["choice1"], row["choice2"])]
    return Item.of(f"{row['premise'].rstrip('. ')} {link}", choices, row["label"])
