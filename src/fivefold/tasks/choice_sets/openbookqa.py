"""OpenBookQA: elementary science facts and common knowledge. Mihaylov et al., arXiv 1809.02789."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fivefold.tasks.choice import Item

SETS = ("openbookqa",)
BY_LENGTH = True


def item(row: Mapping[str, Any]) -> Item:
    choices = row["choices"]
    return Item.of(row["question_stem"], choices["text"], choices["label"].index(row["answerKey"]))
