"""The model as a torch module for training: how it is loaded, run to its loss, and written back.

    hidden = decoder(tokens);  loss = head_loss(hidden, head)

A family whose logits are more than hidden x head and a soft cap (a scale, a bias) goes through its own logits instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from fivefold.errors import Misfit, ModelError
from fivefold.machine import Machine
from fivefold.model import Model
from fivefold.training.batching import Batch, visible
from fivefold.training.cross_entropy import IGNORE, head_loss
from fivefold.weights import StoredTensor, read_tensors, write_safetensors_folder

FAST_BFLOAT16 = {"bf16", "amx"}


def load_module(model: Model, dtype: torch.dtype | None = None) -> Any:
    """The causal language model in `model.path`, in evaluation mode and without gradients.

    `dtype` None keeps bfloat16 weights and makes float32 of all others. Raises Misfit for a GGUF file, ModelError when
    transformers cannot read the folder. No code of the folder is run and no pickle read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    if model.format != "safetensors":
        raise Misfit(f"{model.name} is a GGUF file and has no torch graph; start from its safetensors folder")
    if dtype is None:
        kinds = {t.dtype for _, t in read_tensors(model.path)}
        dtype = torch.bfloat16 if "BF16" in kinds and "F32" not in kinds else torch.float32
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(model.path, local_files_only=True, trust_remote_code=False)
        module = AutoModelForCausalLM.from_pretrained(
            model.path, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"transformers cannot read {model.path} ({reason}); give a folder of a family it knows"
        ) from None
    finally:
        if shown:
            logging.enable_progress_bar()
    return module.eval().requires_grad_(False)


def computing_dtype(wanted: str) -> torch.dtype:
    """bfloat16 where the machine multiplies it faster than float32 ("auto"), else what was asked."""
    if wanted == "auto":
        fast = torch.cuda.is_available() or bool(FAST_BFLOAT16 & set(Machine.probe().isa))
        wanted = "bfloat16" if fast else "float32"
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc keeps what lies between tensors that stay)."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def stored_name(module: Any, stored: Mapping[str, Any], name: str) -> str:
    """The name a parameter has on disk; some checkpoints leave out the name of the base model."""
    for candidate in (name, name.removeprefix(f"{module.base_model_prefix}.")):
        if candidate in stored:
            return candidate
    raise ModelError(f"the parameter {name} is not in the weight files; save the model again with transformers")


CAPS = ("final_logit_softcapping", "logits_soft_cap")
BEYOND = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


def plain_head(module: Any) -> bool:
    """Whether the logits are the hidden states times the head's weight, and nothing else."""
    return soft_cap(module) == 0.0


def soft_cap(module: Any) -> float | None:
    """c where the logits are c tanh(hidden x head / c), 0 where they are hidden x head, None where they are neither."""
    beyond = [getattr(module.config, name, None) for name in BEYOND]
    if getattr(module.get_output_embeddings(), "bias", None) is not None or any(v not in (None, 1) for v in beyond):
        return None
    return next((float(c) for name in CAPS if (c := getattr(module.config, name, None))), 0.0)


@torch.no_grad()
def packs(module: Any, longest: int) -> bool:
    """Whether examples of at most `longest` tokens can share a row, each seen as if it were alone.

    Not where a state or a convolution runs along the row, nor where attention has a window shorter than an example (the
    mask of a row replaces the model's own). The former is tried out.
    """
    windows = (getattr(module.config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if any(window and window < longest for window in windows):
        return False
    length = 6
    tokens = (torch.arange(3 * length, device=module.device) * 7 % min(64, module.config.vocab_size)).view(3, length)
    same = torch.ones(length, length, dtype=torch.bool, device=module.device).tril()
    seen = torch.block_diag(same, same).bool()
    hide = torch.zeros(seen.shape, dtype=module.dtype, device=module.device).masked_fill_(~seen, -math.inf)[None, None]
    places = torch.arange(length, device=module.device).repeat(2)[None]

    def states(ids: torch.Tensor, **more: Any) -> torch.Tensor:
        out: torch.Tensor = module.base_model(input_ids=ids.view(1, -1), use_cache=False, **more).last_hidden_state
        return out[0, -length:].float()

    try:
        one, other = (states(tokens[[i, 2]], attention_mask=hide, position_ids=places) for i in (0, 1))
    except (RuntimeError, TypeError, ValueError):
        return False
    alone = states(tokens[2])
    return torch.equal(one, other) and bool((one - alone).abs().max() < 0.05 * alone.abs().max())


def loss_of(module: Any, hidden: Callable[..., torch.Tensor] | None = None) -> Callable[[Batch], torch.Tensor]:
    """The mean loss of a batch's targets. `hidden(tokens, **more)` replaces the decoder's own pass."""
    head, cap = module.get_output_embeddings(), soft_cap(module)

    def states(tokens: torch.Tensor, **more: Any) -> torch.Tensor:
        out: torch.Tensor = module.base_model(input_ids=tokens, use_cache=False, **more).last_hidden_state
        return out

    run, device = hidden or states, module.device

    def loss(batch: Batch) -> torch.Tensor:
        more: dict[str, Any] = {}
        mask = visible(batch)
        if mask is not None:
            seen = torch.from_numpy(mask).to(device)
            hide = torch.zeros(seen.shape, dtype=module.dtype, device=device).masked_fill_(~seen, -math.inf)
            more = {"attention_mask": hide, "position_ids": torch.from_numpy(batch.positions).to(device)}
        tokens, targets = torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.targets).to(device)
        if cap is not None:
            return head_loss(run(tokens, **more), head.weight, targets, cap=cap)
        logits = module(input_ids=tokens, use_cache=False, **more).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    return loss


@dataclass(frozen=True)
class Made:
    """A tensor computed when it is written, so that only one is in memory. `make` gives float32."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    def raw(self) -> Any:
        value = self.make()
        if self.dtype == "BF16":
            return value.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().reshape(-1)
        kind = {"F32": np.float32, "F16": np.float16}[self.dtype]
        return np.ascontiguousarray(value.numpy().astype(kind)).view(np.uint8).reshape(-1)


def write_trained(
    module: Any, model: Model, weights: Mapping[str, Callable[[], torch.Tensor]], folder: Path
) -> Path:
    """A folder like the model's, its tensors copied, with `weights` (module name -> float32 value) in their places."""
    tensors: dict[str, Any] = dict(read_tensors(model.path))
    for name, make in weights.items():
        stored: StoredTensor = tensors[on_disk := stored_name(module, tensors, name)]
        kind = stored.dtype if stored.dtype in ("F32", "F16", "BF16") else "F32"
        tensors[on_disk] = Made(kind, stored.shape, make)
    return write_safetensors_folder(folder, tensors, like=model.path)
