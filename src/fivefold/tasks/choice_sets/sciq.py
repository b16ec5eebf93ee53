"""SciQ: science exam questions with a supporting paragraph. Welbl et al., arXiv 1707.06209."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fivefold.tasks.choice import Item

SETS = ("sciq",)
BY_LENGTH = True


def item(row: Mapping[str, Any]) -> Item:
    choices = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    return Item.of(f"{row['support']}\nQuestion: {row['question']}\nAnswer:".lstrip(), choices, 3)
