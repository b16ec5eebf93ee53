"""Engines: one file per runtime that serves an artifact. Load, score tokens, generate, describe.

An engine knows files and tokens; it knows no technique, no recipe, no meter and no task. A new engine is a module
here with a function `open(model: Model) -> Session` and the constants `FORMATS` (what it reads: "safetensors",
"gguf") and `EXTRA` (the optional dependency it needs, or None). The module's name, "__" read as "+" and "_" as ".",
is the engine's public name: `llama_cpp.py` -> "llama.cpp", `torch_.py` -> "torch". Files that start with "_" are
private.

Token ids are plain ints of the model's own tokenizer; tokenizing happens outside, once, with `tokenizer.json`, so
that every engine sees the same tokens and a comparison between engines is a comparison of engines.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from fivefold.errors import ModelError
from fivefold.model import Model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy. `stop` are token ids that end the answer (and are not yielded)."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: frozenset[int] = frozenset()


class Session(Protocol):
    """One loaded artifact. Not thread-safe: one caller at a time."""

    vocab: int

    def score(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities, shape (len(tokens), vocab); row i is the distribution of token i + 1."""
        ...

    def generate(
        self, prompt: Sequence[int], max_tokens: int, sampling: Sampling = Sampling()
    ) -> Iterator[int]:
        """Yield token ids as they are drawn; closing the iterator stops the work. Honours the decode plan.

        The longest prefix of `prompt` that is already in the cache from the previous call is NOT reused: every
        call prefills from nothing, so that time to first token means the same for everyone.
        """
        ...

    def generate_batch(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Greedy continuations of several prompts decoded together (continuous batch where the engine has one)."""
        ...

    def describe(self) -> dict[str, Any]:
        """Engine, version, threads really used, dtype, weight bytes, cache bytes per token: what a reader needs."""
        ...

    def close(self) -> None: ...


def names() -> list[str]:
    """Public names of the engines in this folder."""
    return sorted(_public(m.name) for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def _public(module: str) -> str:
    return module.rstrip("_").replace("__", "+").replace("_", ".")


def module(name: str) -> ModuleType:
    """The engine's module, without loading its runtime."""
    for info in pkgutil.iter_modules(__path__):
        if not info.name.startswith("_") and _public(info.name) == name:
            return importlib.import_module(f"{__name__}.{info.name}")
    raise ModelError(f"there is no engine {name!r}; engines: {', '.join(names())}")


def default_engine(model: Model) -> str:
    """The engine a model runs in when its recipe chose none: its plan's, else by its format."""
    return model.run.engine or {"safetensors": "torch", "gguf": "llama.cpp"}[model.format]


def open_session(model: Model) -> Session:
    """Load `model` (already exported: its `path` is what the engine reads) into its serving engine."""
    name = default_engine(model)
    engine = module(name)
    if model.format not in engine.FORMATS:
        raise ModelError(
            f"{name} reads {' or '.join(engine.FORMATS)}, and {model.path.name} is {model.format};"
            " add gguf(type=...) to the recipe or choose another engine"
        )
    session: Session = engine.open(model)
    return session
