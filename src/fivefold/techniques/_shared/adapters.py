"""Adapters through `peft`: put in, read out in peft's own format, merged into the weights that are stored.

An adapter is merged into the stored float32 weight, not into the bfloat16 that was computed with:

    W = W_stored + delta,   delta = what peft says the layer's adapter adds

so the merged model is the parent plus exactly what was learned.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from fivefold.techniques._shared.modules import is_linear, linears
from fivefold.training.delta import Delta
from fivefold.training.method import Lesson

NAME = "default"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def targets(lesson: Lesson) -> list[str]:
    """The last parts of the names of all linear layers inside the decoder's layers."""
    return sorted({name.rpartition(".")[2] for name, _ in linears(lesson.module)})


def lora_config(lesson: Lesson, rank: int, alpha: float, **more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets(lesson), lora_dropout=0.0, bias="none",
                      task_type="CAUSAL_LM", fan_in_fan_out=lesson.module.config.model_type == "gpt2", **more)


def inject(lesson: Lesson, config: Any) -> dict[str, nn.Parameter]:
    """Adapters in `lesson.module`, in float32; the parameters peft trains, by name."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, lesson.module, adapter_name=NAME)
    lesson.extra["config"] = config
    trained = {name: p for name, p in lesson.module.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    return trained


def saved(lesson: Lesson) -> dict[str, Any]:
    """peft's two files: its config as JSON, its weights under the names it looks for."""
    from peft.utils import get_peft_model_state_dict

    config = {k: sorted(v) if isinstance(v, set) else v for k, v in lesson.extra["config"].to_dict().items()}
    config |= {"inference_mode": True, "base_model_name_or_path": lesson.model.name}
    weights = get_peft_model_state_dict(lesson.module, adapter_name=NAME, save_embedding_layers=False)
    named = {f"base_model.model.{name}": t.detach().contiguous() for name, t in weights.items()}
    return {CONFIG: _plain(config), WEIGHTS: named}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(getattr(value, "value", value))


def adapted(lesson: Lesson) -> dict[str, Any]:
    """Name of the layer in the model -> peft's layer around it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: part for name, part in lesson.module.named_modules()
            if isinstance(part, BaseTunerLayer) and is_linear(part.get_base_layer())}


def merged(lesson: Lesson, added: Callable[[Any], torch.Tensor] | None = None) -> Delta:
    """The adapter merged. `added(layer)` is what a layer's adapter adds to its weight, as stored (default: peft's)."""
    from fivefold.training.run import stored_value

    def value(name: str, layer: Any) -> torch.Tensor:
        change = layer.get_delta_weight(NAME) if added is None else added(layer)
        return stored_value(lesson, f"{name}.weight") + change.detach().float()

    weights = {f"{name}.weight": partial(value, name, layer) for name, layer in adapted(lesson).items()}
    return Delta(weights=weights, files=saved(lesson))
