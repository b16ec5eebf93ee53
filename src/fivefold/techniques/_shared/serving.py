"""What the planned file is, and whether the planned engine can run it: asked before any work.

An engine's module says what it reads in constants: `FORMATS`, and where it has limits `GGUF_TYPES` (storage types of
matrices), `CACHE_TYPES` (key-value cache) and `LOOKUP` (False: does not draft from the prompt). A constant that is
absent means no limit is known, and the engine itself refuses at load. `ADAPTERS` True: it computes with an adapter
beside the weights, `DRAFTS` True: it takes a draft model; without these it does not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fivefold import engines
from fivefold.errors import Misfit, MissingExtra
from fivefold.model import Model, Trait

PACKAGES = {"openvino": "openvino_genai"}
"""Optional dependency of `pyproject.toml` -> the package it installs."""


def planned_format(model: Model) -> str:
    return "gguf" if model.format == "gguf" else model.export.format


def planned_types(model: Model) -> frozenset[str]:
    """Storage types of the matrices in the planned GGUF file; empty for safetensors."""
    if model.format == "gguf" and Path(model.path).is_file():
        from fivefold.weights import gguf_header

        return frozenset(t.type.lower() for t in gguf_header(model.path).tensors if len(t.shape) == 2)
    if planned_format(model) != "gguf":
        return frozenset()
    plan = model.export
    return frozenset({plan.default, plan.embedding or plan.default, *plan.types.values()})


def engine_name(model: Model) -> str:
    """The engine the plan ends in: the chosen one, else that of the planned format."""
    return model.run.engine or ("llama.cpp" if planned_format(model) == "gguf" else "torch")


def limit(model: Model, constant: str) -> Any:
    """A constant of the planned engine's module, or None."""
    return getattr(engines.module(engine_name(model)), constant, None)


def refuse_unknown(owner: str, value: str, what: str, allowed: Iterable[str] | None, engine: str) -> None:
    """Raise Misfit unless `value` is among `allowed`; None allows everything."""
    if allowed is not None and value not in allowed:
        raise Misfit(
            f"{owner} does not fit: {engine} runs {what} {' or '.join(allowed)}; choose one of these or another engine"
        )


def check_engine(model: Model, owner: str) -> None:
    """Refuse a plan the engine cannot run: wrong format, storage types it does not read, or not installed."""
    engine = engine_name(model)
    module = engines.module(engine)
    if module.EXTRA is not None:
        package = PACKAGES.get(module.EXTRA, module.EXTRA)
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, extra=module.EXTRA)
    if Trait.PLAIN_GRAPH not in model.traits and not getattr(module, "ADAPTERS", False):
        raise Misfit(
            f'{owner} reads no adapter beside the weights; choose engine(type="torch"), or an adapter that is merged,'
            " such as lora"
        )
    if model.decode.draft_tokens and not getattr(module, "DRAFTS", False):
        raise Misfit(f"{owner} takes no draft model; remove speculative or choose another engine")
    planned = planned_format(model)
    if planned not in module.FORMATS:
        repair = 'add gguf(type="f16") or a smaller type' if "gguf" in module.FORMATS else "remove the GGUF technique"
        raise Misfit(f"{owner} reads {' or '.join(module.FORMATS)}, and this recipe makes {planned}; {repair}")
    readable = getattr(module, "GGUF_TYPES", None)
    if readable is None:
        return
    strange = sorted(planned_types(model) - {t.lower() for t in readable})
    if strange:
        known = ", ".join(sorted(t.lower() for t in readable))
        raise Misfit(
            f"{owner} reads GGUF files of {known}, not of {', '.join(strange)}; choose another type or engine"
        )
