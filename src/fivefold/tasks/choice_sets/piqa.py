"""PIQA: which of two ways to reach a goal works. Bisk et al., arXiv 1911.11641."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fivefold.tasks.choice import Item

SETS = ("piqa",)
BY_LENGTH = True


def item(row: Mapping[str, Any]) -> Item:
    return Item.of(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])
