"""HellaSwag: which ending continues the scene. Zellers et al., arXiv 1905.07830."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fivefold.tasks.choice import Item

SETS = ("hellaswag",)
BY_LENGTH = True


def item(row: Mapping[str, Any]) -> Item:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Item.of(_clean(context), [_clean(ending) for ending in row["endings"]], int(row["label"]))


def _clean(text: str) -> str:
    """Remove the marks of the set's WikiHow half."""
    return re.sub(r"\s+", " ", re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))).strip()
