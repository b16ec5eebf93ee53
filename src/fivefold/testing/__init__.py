"""Testing: public fakes and the contract every technique keeps. For our tests and for those of outside authors.

What lives here: `tiny_model` (a random model with its own tokenizer), `ReplayMeter` and `Table` (a study replayed from
recorded trials), `TechniqueContract` (a test class to inherit). What may not: anything a user's run depends on.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fivefold.testing.contract import TechniqueContract
    from fivefold.testing.replay import ReplayMeter, Table
    from fivefold.testing.tiny import tiny_model

_HOME = {"TechniqueContract": "contract", "ReplayMeter": "replay", "Table": "replay", "tiny_model": "tiny"}
__all__ = ["ReplayMeter", "Table", "TechniqueContract", "tiny_model"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
