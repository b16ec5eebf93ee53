"""BoolQ: yes or no, answered from a passage. Clark et al., arXiv 1905.10044."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fivefold.tasks.choice import Item

SETS = ("boolq",)
BY_LENGTH = False


def item(row: Mapping[str, Any]) -> Item:
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return Item.of(context, ["no", "yes"], int(row["answer"]))
