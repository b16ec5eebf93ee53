"""ARC, the easy and the challenge part: school science questions. Clark et al., arXiv 1803.05457."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fivefold.tasks.choice import Item

SETS = ("arc-easy", "arc-challenge")
BY_LENGTH = True


def item(row: Mapping[str, Any]) -> Item:
    choices = row["choices"]
    return Item.of(f"Question: {row['question']}\nAnswer:", choices["text"], choices["label"].index(row["answerKey"]))
