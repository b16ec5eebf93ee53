"""A learned prefix in a module that is trained: peft holds its numbers, and every pass begins with them in the cache.

Tokens stand `tokens` places later than without, as they will when peft or the torch engine serves the prefix. The cache
given to the decoder never grows: a layer that is run twice (activations made again) sees the same keys twice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fivefold.engines._peft import peft
from fivefold.errors import DataError, Misfit
from fivefold.techniques._shared.adapters import saved
from fivefold.training import attention
from fivefold.training.method import Lesson
from fivefold.training.module import plain_head


class _Before(DynamicCache):
    """The prefix of a cache before whatever is put in; nothing is kept."""

    def __init__(self, held: Any, length: int) -> None:
        super().__init__()
        self.pairs, self.length = [(layer.keys, layer.values) for layer in held.layers], length

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        keys, values = self.pairs[layer_idx]
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


def wrapped(lesson: Lesson, tokens: int) -> Any:
    """peft's model around the module, with a random prefix. Raises Misfit for a family whose passes it cannot begin."""
    module: Any = lesson.module
    if not plain_head(module):
        raise Misfit(f"prefix is not trained in {module.config.model_type}, whose logits are more than a product"
                     " with the head; use lora there")
    if module.config._attn_implementation == attention.NAME:
        module.set_attn_implementation("sdpa")  # the lean one has as many keys as queries
    config = peft().PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    lesson.extra["config"] = config
    return peft().get_peft_model(module, config)


def hidden(lesson: Lesson, held: Any) -> Callable[..., Tensor]:
    """From tokens (rows, length) to final hidden states (rows, length, width), the prefix in front."""
    module: Any = lesson.module
    before = held.active_peft_config.num_virtual_tokens
    places = module.config.max_position_embeddings

    def run(tokens: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        rows, length = tokens.shape
        mask, positions = attention_mask, position_ids
        if mask is None:
            mask = torch.full((rows, 1, length, length), -math.inf, dtype=module.dtype, device=tokens.device).triu(1)
        if positions is None:
            positions = torch.arange(length, device=tokens.device).expand(rows, -1)
        if before + int(positions.max()) >= places:
            raise DataError(f"a row of {int(positions.max()) + 1} tokens behind a prefix of {before} does not fit the"
                            f" context of {places}; shorten the rows or the prefix")
        out: Tensor = module.base_model(
            input_ids=tokens, attention_mask=torch.cat([mask.new_zeros(rows, 1, length, before), mask], -1),
            position_ids=positions + before, past_key_values=_Before(held.get_prompt(rows), before), use_cache=False,
        ).last_hidden_state
        return out

    return run


@torch.no_grad()
def begin(lesson: Lesson, held: Any, texts: Sequence[Sequence[int]]) -> None:
    """Let the prefix be what the module computes for the first of `texts`, said again where they are too short."""
    module: Any = lesson.module
    weight = held.prompt_encoder["default"].embedding.weight
    tokens = list(itertools.islice(itertools.cycle(itertools.chain.from_iterable(texts)), len(weight)))
    training = module.training
    module.eval()
    try:
        ids = torch.tensor([tokens], device=weight.device)
        cache = module.base_model(input_ids=ids, use_cache=True).past_key_values
    finally:
        module.train(training)
    pairs = torch.stack([part[0].float() for layer in cache.layers for part in (layer.keys, layer.values)])
    weight.data.copy_(pairs.permute(2, 0, 1, 3).reshape(weight.shape))


def files(lesson: Lesson, weight: Tensor) -> dict[str, Any]:
    """peft's two files."""
    return saved(lesson, {"prompt_embeddings": weight.detach().contiguous()})
