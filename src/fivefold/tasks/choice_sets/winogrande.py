"""WinoGrande: which name fills the gap; the text after it is scored under each. Sakaguchi et al., arXiv 1907.10641."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fivefold.tasks.choice import Item

SETS = ("winogrande",)
BY_LENGTH = False


def item(row: Mapping[str, Any]) -> Item:
    before, _, after = row["sentence"].partition("_")
    contexts = (before + row["option1"], before + row["option2"])
    return Item(contexts, (after, after), int(row["answer"]) - 1)
