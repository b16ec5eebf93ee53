"""The residual stream in another basis: what turns with it, what a slice of it leaves, which basis keeps most.

Between its layers a decoder only adds to a vector x of the model's width D, and reads it through RMSNorm:

    y = W diag(g) x / r(x),    r(x) = sqrt(|x|^2 / D + eps)

With the gain g folded into W and Q orthogonal, r(Q^T x) = r(x), so x -> Q^T x everywhere changes nothing:

    embedding E Q        reads (q, k, v, gate, up, head) W diag(g) Q        writes (o, down) Q^T W, bias Q^T b

A slice keeps the first d columns of Q, z = (Q^T x)[:d], and still divides by sqrt(|z|^2 / D + eps) with the old D. An
RMSNorm of width d divides by sqrt(|z|^2 / d + eps'), which is sqrt(D / d) as much if eps' = eps D / d: so the gain of
every norm becomes sqrt(D / d). Q holds the principal axes of all norms' inputs, each divided by r(x) as the norm will.

Source: SliceGPT (Ashkboos et al., arXiv 2401.15024).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fivefold.errors import Misfit
from fivefold.model import Model
from fivefold.techniques._shared.modules import forward, layers
from fivefold.training.module import Made
from fivefold.weights import read_tensors

if TYPE_CHECKING:
    from fivefold.weights import StoredTensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Decoders of the shape above: RMSNorm before attention and feed-forward, no other scale on the stream."""
HEAD = "lm_head.weight"
_LAYER = re.compile(r"((?:.*\.)?layers\.\d+\.)(.+)")
_FIRST, _SECOND = "input_layernorm.weight", "post_attention_layernorm.weight"
_READS = {f"self_attn.{p}_proj.weight": _FIRST for p in "qkv"} | {f"mlp.{p}_proj.weight": _SECOND
                                                                  for p in ("gate", "up")}
_WRITES = {f"{part}.{kind}" for part in ("self_attn.o_proj", "mlp.down_proj") for kind in ("weight", "bias")}
_STAY = {f"self_attn.{p}_proj.bias" for p in "qkv"} | {"mlp.gate_proj.bias", "mlp.up_proj.bias"} | {
    "self_attn.q_norm.weight", "self_attn.k_norm.weight", "self_attn.rotary_emb.inv_freq"}
_OUTSIDE = re.compile(r"(.*\.)?(embed_tokens|norm)\.weight")


def check_residual(model: Model, owner: str) -> None:
    """Refuse what does not read its residual stream as above. Raises Misfit."""
    family = model.blueprint.family
    if family not in FAMILIES:
        raise Misfit(
            f"{owner} folds RMSNorm into what follows it, and {family} is not one of {', '.join(FAMILIES)}; use"
            " prune_width or prune_depth instead"
        )
    for name, _ in read_tensors(model.path):
        inside = _LAYER.fullmatch(name)
        known = inside[2] in _READS.keys() | _WRITES | _STAY | {_FIRST, _SECOND} if inside else (
            name == HEAD or _OUTSIDE.fullmatch(name))
        if not known:
            raise Misfit(f"{owner} has no place for {name} of {model.name}; use prune_width or prune_depth instead")


def axes(module: Any, tokens: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q, shares): principal axes in columns, (D, D) float64, and each one's share of the signal, both descending.

    One window of `tokens` (windows, length) at a time; every token counts alike in every norm.
    """
    norms = [norm for layer in layers(module) for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    width = module.config.hidden_size
    total = torch.zeros(width, width, dtype=torch.float64)

    def before(_: Any, args: Any) -> None:
        x = args[0].detach().reshape(-1, width).float()
        x = x / x.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
        total.add_((x.T @ x).double())

    handles = [norm.register_forward_pre_hook(before) for norm in (*norms, module.base_model.norm)]
    try:
        for row in tokens:
            forward(module, row[None])
    finally:
        for handle in handles:
            handle.remove()
    values, vectors = torch.linalg.eigh(total)
    return vectors.flip(1), values.flip(0).clamp_min(0) / values.sum()


def turned(tensors: Mapping[str, StoredTensor], basis: torch.Tensor) -> dict[str, Any]:
    """The tensors in the first columns of Q, `basis` (D, d): each computed when it is written. The head gets its own.

    `tensors` of a model whose head is its embedding may lack it or hold it.
    """
    width, kept = basis.shape
    gain = torch.full((kept,), (width / kept) ** 0.5)
    out: dict[str, Any] = {}
    for name, tensor in tensors.items():
        inside, outside = _LAYER.fullmatch(name), _OUTSIDE.fullmatch(name)
        part = inside[2] if inside else ""
        if part in _READS:
            assert inside is not None
            out[name] = _read(tensor, basis, tensors[inside[1] + _READS[part]])
        elif part in _WRITES:
            out[name] = _write(tensor, basis)
        elif part in (_FIRST, _SECOND) or (outside and outside[2] == "norm"):
            out[name] = Made(tensor.dtype, (kept,), lambda: gain)
        elif outside:
            out[name] = _read(tensor, basis, None)
            last = tensors[f"{outside[1] or ''}norm.weight"]
            out[HEAD] = _read(tensors.get(HEAD, tensor), basis, last)
        elif name != HEAD:
            out[name] = tensor
    return out


def _read(tensor: StoredTensor, basis: torch.Tensor, gain: StoredTensor | None) -> Made:
    """W diag(g) Q; g is 1 without `gain`."""

    def make() -> torch.Tensor:
        own = basis if gain is None else basis * torch.from_numpy(gain.numpy()).double()[:, None]
        return torch.from_numpy(tensor.numpy()) @ own.float()

    return Made(tensor.dtype, (tensor.shape[0], basis.shape[1]), make)


def _write(tensor: StoredTensor, basis: torch.Tensor) -> Made:
    """Q^T W, or Q^T b."""
    return Made(tensor.dtype, (basis.shape[1], *tensor.shape[1:]),
                lambda: basis.T.float() @ torch.from_numpy(tensor.numpy()))
