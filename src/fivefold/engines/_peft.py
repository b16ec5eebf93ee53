"""`peft`, imported without a word and without the network.

peft imports bitsandbytes where it is installed, and bitsandbytes, while it is imported on a processor with bfloat16
instructions, asks the package `kernels` to fetch compiled code from a hub: a download where that package is installed,
a warning on stderr where it is not. Here bitsandbytes is imported first, and as if `kernels` were not installed; its
own compiled code is used either way.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

FETCHING, TALKING = "kernels", "bitsandbytes.backends.cpu.ops"
_absent: Any = object()


@cache
def peft() -> ModuleType:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if importlib.util.find_spec("bitsandbytes") is not None:
        bitsandbytes()
    import peft

    return peft


@cache
def bitsandbytes() -> ModuleType:
    """Raises ModuleNotFoundError when it is not installed."""
    with _alone():
        import bitsandbytes

    return bitsandbytes


@contextmanager
def _alone() -> Iterator[None]:
    kept, log = sys.modules.get(FETCHING, _absent), logging.getLogger(TALKING)
    level = log.level
    sys.modules[FETCHING] = None  # type: ignore[assignment]
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        del sys.modules[FETCHING]
        if kept is not _absent:
            sys.modules[FETCHING] = kept
