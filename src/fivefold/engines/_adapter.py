"""An adapter that lies beside the weights (folder `adapter/`), put into a torch model when it is opened.

A bottleneck adapter changes the layers themselves, and nothing else need know of it. A learned prefix is a number of
keys and values that are in the cache before the first token: tokens then stand at places from `Prefix.length` on, and
every token sees the prefix. The prefix is read, checked and shaped by `peft`.

    adapter_config.json, adapter_model.safetensors      a prefix, in peft's own format
    bottleneck.json, bottleneck.safetensors             see `_bottleneck`
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fivefold.errors import ModelError
from fivefold.model import ADAPTER

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Prefix:
    """Keys and values before the text. `describe` names it."""

    def __init__(self, wrapped: Any) -> None:
        config = wrapped.active_peft_config
        self.wrapped, self.length = wrapped, int(config.num_virtual_tokens)
        self.describe = f"prefix of {self.length}"
        self.tensors = list(wrapped.prompt_encoder.parameters())

    def room(self) -> int:
        """Places the model has left for a text."""
        return int(self.wrapped.config.max_position_embeddings) - self.length

    def before(self, rows: int, cache: Any, more: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The cache to begin with, and a mask and places that were meant for the text alone, made to fit it."""
        import torch

        out = dict(more)
        if "attention_mask" in out:
            mask = out["attention_mask"]
            out["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.length), mask], 1)
        if "position_ids" in out:
            out["position_ids"] = out["position_ids"] + self.length
        return self.wrapped.get_prompt(rows) if cache is None else cache, out


def attach(module: Any, folder: Path) -> tuple[Prefix | None, str]:
    """Put the adapter of the model in `folder` into `module`: (its prefix, what it is), (None, "") when it has none.

    Raises ModelError when there is one that cannot be read, or that belongs to another model.
    """
    adapter = folder / ADAPTER
    if not adapter.is_dir():
        return None, ""
    from fivefold.engines import _bottleneck

    if (adapter / _bottleneck.CONFIG).is_file():
        return None, f"bottleneck of {_bottleneck.load(module, adapter, module.dtype)}"
    if not all((adapter / name).is_file() for name in (CONFIG, WEIGHTS)):
        raise ModelError(f"{adapter} holds no adapter that the torch engine knows; make the artifact again")
    prefix = _prefix(module, adapter)
    return prefix, prefix.describe


def _prefix(module: Any, adapter: Path) -> Prefix:
    from fivefold.engines._peft import peft

    library = peft()
    config = library.PeftConfig.from_pretrained(str(adapter))
    if config.peft_type != library.PeftType.PREFIX_TUNING:
        raise ModelError(f"{adapter} holds {config.peft_type.value}, which is merged before it is served; merge it")
    return Prefix(library.PeftModel.from_pretrained(module, str(adapter), config=config).eval())
