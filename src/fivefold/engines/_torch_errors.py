"""What PyTorch, transformers and safetensors raise on a model they cannot load or run, as errors of ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fivefold.errors import ModelError, OutOfMemory
from fivefold.model import Model


def check_loaded(model: Model, report: Mapping[str, Any]) -> None:
    """Every weight the config describes was there in its shape, and no layer is left over."""
    if report["missing_keys"]:
        raise ModelError(f"{model.path} lacks the weights {min(report['missing_keys'])}; copy the model again")
    if report["mismatched_keys"]:
        name, stored, described = min(report["mismatched_keys"])
        raise ModelError(
            f"{model.path} holds {name} in shape {list(stored)} and its config.json describes {list(described)};"
            " copy the model again"
        )
    for name in sorted(report["unexpected_keys"]):
        layer = re.match(r"(?:\w+\.)?(?:layers|h)\.(\d+)\.", name)
        if layer and int(layer[1]) >= model.blueprint.layers:
            raise ModelError(
                f"{model.path} holds {name} and its config.json describes {model.blueprint.layers} layers;"
                " correct config.json or copy the model again"
            )


@contextmanager
def memory() -> Iterator[None]:
    """PyTorch's refused allocation, as the typed outcome of a trial."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise OutOfMemory("torch could not allocate memory for this batch and context") from None
        raise


@contextmanager
def one_sentence(model: Model) -> Iterator[None]:
    """What transformers and safetensors raise on a folder they cannot load, as ModelError."""
    from safetensors import SafetensorError

    try:
        with memory():
            yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())[:160]
        raise ModelError(f"transformers cannot load {model.path} ({said}); check the folder") from None
