"""Causal attention for training on a processor: as products of matrices, a block of queries at a time, nothing kept.

    S = q k' / sqrt(d)      P = softmax(S)      o = P v

On a processor in bfloat16, batched matrix products of this size run nearer to the machine's rate than PyTorch's fused
kernel does. Heads that share a key-value head are stacked into one product (grouped-query attention),
a block of `BLOCK` queries sees only the keys up to its end, and the backward pass makes P again from q and k instead of
keeping length^2 numbers per head. Scores are rounded to the computing dtype before the softmax, as eager attention
does.

It does not help on accelerators, whose fused kernels are better.

Source: the blocks are those of Dao et al., arXiv 2205.14135, without their second level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch

NAME = "fivefold_lean"
BLOCK = 256


class _Causal(torch.autograd.Function):
    """Shapes as in `forward`."""

    @staticmethod
    def forward(ctx, q, k, v, scale, mask):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        return forward(q, k, v, scale, mask, Fresh())

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, mask = ctx.saved_tensors
        return *backward(q, k, v, ctx.scale, mask, grad, Fresh()), None, None


class Rooms(Protocol):
    """Where temporary tensors come from; see `layer.Room`."""

    def take(self, name: str, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor: ...


class Fresh:
    """Every tensor anew."""

    def take(self, name: str, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(tuple(shape))


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None, room: Rooms
) -> torch.Tensor:
    """q (batch, heads, length, width), k and v (batch, kv heads, length, width); `mask` (batch, 1, length, length) is
    added to the scores, None: causal. The shape of q."""
    out = room.take("attended", q.shape, q)
    for rows, seen in _blocks(q.shape[2]):
        queries = _stacked(q, k, rows, scale)
        p = _weights(queries, k[:, :, :seen], rows, mask, room)
        _unstack(torch.bmm(p, _flat(v[:, :, :seen])), out, rows)
    return out


def backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None, grad: torch.Tensor,
    room: Rooms,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v."""
    of_q, single = room.take("attended", q.shape, q), q.shape[2] <= BLOCK
    of_k, of_v = (k, v) if single else (torch.zeros_like(k), torch.zeros_like(v))
    for rows, seen in _blocks(q.shape[2]):
        keys, values = _flat(k[:, :, :seen]), _flat(v[:, :, :seen])
        queries, g = _stacked(q, k, rows, scale), _stacked(grad, k, rows, 1.0)
        p = _weights(queries, k[:, :, :seen], rows, mask, room)
        dv = torch.bmm(p.transpose(1, 2), g)
        dp = torch.bmm(g, values.transpose(1, 2), out=room.take("scores", p.shape, p))
        into = room.take("of_scores", p.shape, p)
        ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=into)
        _unstack(torch.bmm(ds, keys).mul_(scale), of_q, rows)
        dk = torch.bmm(ds.transpose(1, 2), queries)
        if single:
            of_k, of_v = dk.view(k.shape), dv.view(v.shape)
        else:
            of_k[:, :, :seen] += dk.view(*k.shape[:2], seen, -1)
            of_v[:, :, :seen] += dv.view(*v.shape[:2], seen, -1)
    return of_q, of_k, of_v


def _blocks(length: int) -> list[tuple[slice, int]]:
    return [(slice(at, min(at + BLOCK, length)), min(at + BLOCK, length)) for at in range(0, length, BLOCK)]


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, *x.shape[2:])


def _stacked(x: torch.Tensor, k: torch.Tensor, rows: slice, scale: float) -> torch.Tensor:
    """(batch x kv heads, sharing heads x rows, width): the heads that share a key-value head below each other."""
    part = x[:, :, rows]
    batch, heads, length, width = part.shape
    part = part.reshape(batch * k.shape[1], heads // k.shape[1] * length, width)
    return part * scale if scale != 1.0 else part


def _unstack(product: torch.Tensor, out: torch.Tensor, rows: slice) -> None:
    batch, heads, _, width = out.shape
    out[:, :, rows] = product.view(batch, heads, -1, width)


def _weights(
    queries: torch.Tensor, k: torch.Tensor, rows: slice, mask: torch.Tensor | None, room: Rooms
) -> torch.Tensor:
    batch, _, seen, _ = k.shape
    length = rows.stop - rows.start
    into = room.take("scores", (*queries.shape[:2], seen), queries)
    scores = torch.bmm(queries, _flat(k).transpose(1, 2), out=into)
    shaped = scores.view(batch, -1, length, seen)
    shaped += _triangle(length, seen, scores.dtype, scores.device) if mask is None else mask[:, :, rows, :seen]
    return torch.softmax(scores, -1, out=room.take("weights", scores.shape, scores))


def _triangle(length: int, seen: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((length, seen), -math.inf, dtype=dtype, device=device).triu_(seen - length + 1)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal attention, shapes as in `forward`; a `mask` must hide the future too, and is of q's dtype."""
    out: torch.Tensor = _Causal.apply(q, k, v, 1 / math.sqrt(q.shape[-1]) if scale is None else scale, mask)
    return out


def _interface(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls; the result is (batch, length, heads, width)."""
    odd = [name for name in ("softcap", "s_aux", "position_bias") if more.get(name) is not None]
    if dropout or odd or query.shape[2] != key.shape[2]:
        raise ValueError(f"this attention knows no {', '.join(odd) or 'dropout and no cache'}; use sdpa")
    mask = additive(attention_mask, query.dtype)
    return attend(query, key, value, scaling, mask).transpose(1, 2).contiguous(), None


def additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask of truth values (True: may be seen) as what is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def use(module: Any) -> bool:
    """Let a model of transformers attend this way; False, and nothing done, where it would not be the same function."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = module.config
    special = any(getattr(config, n, None) for n in ("sliding_window", "attn_logit_softcapping", "attention_dropout",
                                                     "attn_pdrop"))
    special |= not all(getattr(part, "is_causal", True) for part in module.modules())
    if special or getattr(config, "_attn_implementation", "") != "sdpa" or not module._can_set_attn_implementation():
        return False
    AttentionInterface.register(NAME, _interface)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    module.set_attn_implementation(NAME)
    return True
