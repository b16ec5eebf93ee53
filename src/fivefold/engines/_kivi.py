"""A key-value cache that stores most tokens in 2, 4 or 8 bits, for models run through transformers.

    keys      q = round((k - zero) / scale) per channel, over a group of tokens: outliers of keys sit in few channels
    values    likewise per token, over a group of channels: a token's values are mixed with that token's weight

Scales and zeros are float16, the zero rounded down and the scale up, so every number lies in the range that the codes
span and comes back within half a step. Fields of a byte are tokens a whole number of rows apart, so a group is unpacked
by shifts alone. The packed part of one layer at a time is turned back when that layer runs; that costs arithmetic
in every pass, and no time is saved by it here.

Which tokens are packed depends on the number of tokens alone (`KiviType.packed`). Places that may be cropped again
(`slack`) are packed one pass later, so a rejected draft leaves no trace. In a batch padded on the left, padding takes
the key of its text's first token, which keeps it out of the ranges.

Source: Liu et al., KIVI, arXiv 2402.02750.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from fivefold.engines._kivi_type import KiviType
from fivefold.errors import ModelError

HALF = torch.finfo(torch.float16)
Packed = tuple[Tensor, Tensor, Tensor]
"""Codes (rows, heads, groups, group * bits / 8, width); scale and zero, which broadcast over (..., group, width)."""


def ranged(cells: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """float16 (scale, zero) of float32 `cells`, over the last dimension, which is kept with length 1."""
    low, high = cells.amin(-1, keepdim=True), cells.amax(-1, keepdim=True)
    zero = _rounded(low, down=True)
    scale = _rounded((high - zero.float()) / (2**bits - 1), down=False).clamp_min(HALF.smallest_normal)
    if not (torch.isfinite(zero).all() and torch.isfinite(scale).all()):
        raise ModelError("keys or values beyond 65,504 or not finite cannot be packed; use the full cache")
    return scale, zero


def _rounded(x: Tensor, down: bool) -> Tensor:
    """float16 on one side of x."""
    half, slack = x.half(), x.abs() * HALF.eps + HALF.smallest_normal
    wrong = half.float() > x if down else half.float() < x
    return torch.where(wrong, (x - slack if down else x + slack).half(), half)


def pack(cells: Tensor, bits: int, group: int, per_channel: bool) -> Packed:
    """`cells` (rows, heads, tokens, width), tokens a multiple of `group` -> codes, scale, zero."""
    rows, heads, tokens, width = cells.shape
    x = cells.float().view(rows, heads, tokens // group, group, width)
    if per_channel:
        scale, zero = (t.transpose(3, 4) for t in ranged(x.transpose(3, 4), bits))
        q = (x - zero.float()) / scale.float()
    else:
        parts = x.view(*x.shape[:4], width // group, group)
        scale, zero = ranged(parts, bits)
        q = ((parts - zero.float()) / scale.float()).view_as(x)
        scale, zero = scale[..., 0], zero[..., 0]
    q = q.round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    fields = q.view(rows, heads, tokens // group, 8 // bits, group * bits // 8, width)
    codes = fields[:, :, :, 0].clone()
    for place in range(1, 8 // bits):
        codes |= fields[:, :, :, place] << bits * place
    return codes, scale.contiguous(), zero.contiguous()


def unpack(packed: Packed, bits: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack`: (rows, heads, tokens, width)."""
    codes, scale, zero = packed
    rows, heads, groups, height, width = codes.shape
    per, mask = 8 // bits, 2**bits - 1
    x = torch.empty((rows, heads, groups, per, height, width))
    for place in range(per):
        x[:, :, :, place] = (codes >> bits * place) & mask
    if scale.shape[3] == 1:  # per channel
        y = x.view(rows, heads, groups, per * height, width).mul_(scale.float()).add_(zero.float())
    else:
        y = x.view(*scale.shape, -1).mul_(scale.float()[..., None]).add_(zero.float()[..., None])
    return y.view(rows, heads, groups * per * height, width).to(dtype)


class KiviLayer(DynamicLayer):
    """`keys` and `values` are those of the newest tokens, exact; `old_keys` and `old_values` the packed rest."""

    keys: Tensor
    values: Tensor

    def __init__(self, kind: KiviType, slack: int = 0, padded: tuple[int, Tensor] | None = None) -> None:
        super().__init__()
        self.kind, self.slack, self.padded, self.count = kind, slack, padded, 0
        self.old_keys: Packed | None = None
        self.old_values: Packed | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._pack(self.get_seq_length())
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        keys, values = self.keys, self.values
        if self.old_keys is not None and self.old_values is not None:
            bits, dtype = self.kind.bits, key_states.dtype
            keys = torch.cat([unpack(self.old_keys, bits, dtype), keys], 2)
            values = torch.cat([unpack(self.old_values, bits, dtype), values], 2)
        self._pack(self.get_seq_length() - self.slack)
        return keys, values

    def _pack(self, tokens: int) -> None:
        """Pack what is to be packed of so many tokens."""
        more = self.kind.packed(tokens) - self.count
        if more <= 0:
            return
        bits, group = self.kind.bits, self.kind.group
        keys = pack(self._without_padding(self.keys[:, :, :more]), bits, group, per_channel=True)
        values = pack(self.values[:, :, :more], bits, group, per_channel=False)
        self.old_keys, self.old_values = _after(self.old_keys, keys), _after(self.old_values, values)
        self.keys, self.values = self.keys[:, :, more:].clone(), self.values[:, :, more:].clone()
        self.count += more

    def _without_padding(self, keys: Tensor) -> Tensor:
        if self.padded is None:
            return keys
        before, count = self.padded
        place = torch.arange(self.count, self.count + keys.shape[2])[None]
        first = torch.where(place < before, place, place.maximum(before + count[:, None]))
        index = (first - self.count).clamp_max(keys.shape[2] - 1)
        return torch.take_along_dim(keys, index[:, None, :, None], 2)

    def get_seq_length(self) -> int:
        return self.count + (self.keys.shape[2] if self.keys is not None and self.keys.numel() else 0)

    def crop(self, tokens_to_remove: int) -> None:
        """As in transformers: the length wanted when positive, what goes when negative."""
        there = self.get_seq_length()
        keep = min(there, tokens_to_remove) if tokens_to_remove > 0 else there + tokens_to_remove
        if keep < self.count:
            raise ValueError(f"{self.count} tokens are packed and cannot be cropped to {keep}; give more slack")
        self.keys, self.values = (t[:, :, : keep - self.count] for t in (self.keys, self.values))

    def nbytes(self) -> int:
        old = (*(self.old_keys or ()), *(self.old_values or ()))
        return sum(t.nbytes for t in (self.keys, self.values, *old))

    def _refuse(self, *args: Any) -> None:
        raise NotImplementedError("a packed cache does not change its rows")

    reorder_cache = batch_repeat_interleave = batch_select_indices = reset = _refuse


def _after(old: Packed | None, new: Packed) -> Packed:
    if old is None:
        return new
    codes, scale, zero = (torch.cat(pair, 2) for pair in zip(old, new, strict=True))
    return codes, scale, zero


class KiviCache(Cache):
    """Takes over `before` (the keys and values of a prefix) when there is one. `mask` is the batch's attention mask."""

    def __init__(self, kind: KiviType, *, slack: int = 0, before: Any = None, mask: Tensor | None = None) -> None:
        taken = list(before.layers) if before is not None else []
        length = before.get_seq_length() if before is not None else 0
        padded = None if mask is None else (length, (mask == 0).sum(1))
        super().__init__(layer_class_to_replicate=lambda: KiviLayer(kind, slack, padded))
        for index, layer in enumerate(taken):
            self.update(layer.keys, layer.values, index)

    def nbytes(self) -> int:
        return sum(layer.nbytes() for layer in self.layers if isinstance(layer, KiviLayer))


def check(config: Any, kind: KiviType) -> None:
    """Raise ModelError for a model whose layers do not all keep the keys and values of every token."""
    strange = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - {DynamicLayer.__name__}
    if strange:
        raise ModelError(f"a {kind} cache does not fit layers that need a {min(strange)}; choose another cache type")
