"""SST-2: is a sentence from a film review positive. Socher et al., EMNLP 2013."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fivefold.tasks.choice import Item

SETS = ("sst2",)
BY_LENGTH = False


def item(row: Mapping[str, Any]) -> Item:
    return Item.of(f"Review: {row['sentence'].strip()}\nSentiment:", ["negative", "positive"], row["label"])
