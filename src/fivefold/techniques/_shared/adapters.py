"""Adapters through `peft`: put in, read out in peft's own format, merged into the weights that are stored.

An adapter is merged into the stored float32 weight, not into the bfloat16 that was computed with:

    W = W_stored + delta,   delta = what peft says the layer's adapter adds

so the merged model is the parent plus exactly what was learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from fivefold.engines._adapter import CONFIG, WEIGHTS
from fivefold.engines._peft import peft
from fivefold.model import Model
from fivefold.techniques._shared.modules import is_linear, linears, matrix
from fivefold.training.delta import Delta
from fivefold.training.method import Lesson
from fivefold.training.module import stored_name
from fivefold.training.run import stored_value
from fivefold.weights import read_tensors

NAME = "default"
Change = Callable[[Any, torch.Tensor], torch.Tensor]
"""(peft's layer, the weight it belongs to as stored, float32) -> the weight with the adapter in it."""


def targets(lesson: Lesson) -> list[str]:
    """The last parts of the names of all linear layers inside the decoder's layers."""
    return sorted({name.rpartition(".")[2] for name, _ in linears(lesson.module)})


def turned(lesson: Lesson) -> bool:
    """Whether the family stores its matrices as (inputs, outputs)."""
    return bool(lesson.module.config.model_type == "gpt2")


def lora_config(lesson: Lesson, rank: int, alpha: float, **more: Any) -> Any:
    return peft().LoraConfig(r=rank, lora_alpha=alpha, **common(lesson), **more)


def common(lesson: Lesson) -> dict[str, Any]:
    """What the configs of low-rank adapters share."""
    return {"target_modules": targets(lesson), "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM",
            "fan_in_fan_out": turned(lesson)}


def inject(lesson: Lesson, config: Any) -> dict[str, nn.Parameter]:
    """Adapters in `lesson.module`, in float32; the parameters peft trains, by name."""
    peft().inject_adapter_in_model(config, lesson.module, adapter_name=NAME)
    return opened(lesson, config)


def opened(lesson: Lesson, config: Any) -> dict[str, nn.Parameter]:
    """The parameters of the adapters that are in the module, in float32."""
    lesson.extra["config"] = config
    trained = {name: p for name, p in lesson.module.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    return trained


def saved(lesson: Lesson, tensors: Mapping[str, torch.Tensor] | None = None, **more: Any) -> dict[str, Any]:
    """peft's two files: its config as JSON with `more` in it, and its weights (default: those of the module)."""
    if tensors is None:
        states = peft().get_peft_model_state_dict(lesson.module, adapter_name=NAME, save_embedding_layers=False)
        tensors = {f"base_model.model.{name}": t.detach().contiguous() for name, t in states.items()}
    config = {**lesson.extra["config"].to_dict(), "inference_mode": True, **more}
    config["base_model_name_or_path"] = lesson.model.name
    return {CONFIG: _plain(config), WEIGHTS: tensors}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, set):
        return sorted(_plain(v) for v in value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(getattr(value, "value", value))


def adapted(lesson: Lesson) -> dict[str, Any]:
    """Name of the layer in the model -> peft's layer around it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: part for name, part in lesson.module.named_modules()
            if isinstance(part, BaseTunerLayer) and is_linear(part.get_base_layer())}


def added(layer: Any, stored: torch.Tensor) -> torch.Tensor:
    """A low-rank adapter merged."""
    change: torch.Tensor = layer.get_delta_weight(NAME).detach().float()
    return stored + change


def merged(lesson: Lesson, change: Change = added, files: Mapping[str, Any] | None = None) -> Delta:
    """The adapter merged by `change`; beside it `files` (default: the adapter as peft saves it)."""

    def value(name: str, layer: Any) -> torch.Tensor:
        return change(layer, stored_value(lesson, name)).detach()

    weights = {f"{name}.weight": partial(value, f"{name}.weight", layer) for name, layer in adapted(lesson).items()}
    return Delta(weights=weights, files=saved(lesson) if files is None else files)


def rounded(matrix: torch.Tensor, type: str) -> torch.Tensor:
    """Float32 (outputs, inputs) rounded to a storage type of llama.cpp, and back."""
    from fivefold.engines._quantize import dequantize, quantize

    shape = (matrix.shape[0], matrix.shape[1])
    return torch.from_numpy(dequantize(quantize(matrix.float().contiguous().numpy(), type), type, shape))


def round_linears(model: Model, module: Any, type: str) -> None:
    """Round the linear layers of the module's decoder, from the stored weights, in place."""
    stored = dict(read_tensors(model.path))
    for name, part in linears(module):
        weight = torch.from_numpy(stored[stored_name(module, stored, f"{name}.weight")].numpy())
        matrix(part).copy_(rounded(weight if isinstance(part, nn.Linear) else weight.T, type))
