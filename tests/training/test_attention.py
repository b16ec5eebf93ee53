"""Blocked attention is scaled dot-product attention, in values and gradients, and refuses to stand in for others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small import gradients, module
from torch.nn import functional as F

from fivefold.training import attention
from fivefold.training.attention import BLOCK, NAME, attend, use

TOKENS = torch.arange(600).view(2, 300) * 11 % 96 + 1


def inputs(batch: int, heads: int, kv_heads: int, length: int, width: int = 8) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(length)
    return [torch.randn(batch, n, length, width, generator=draw, requires_grad=True)
            for n in (heads, kv_heads, kv_heads)]


def compare(ours: torch.Tensor, theirs: torch.Tensor, leaves: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    along = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9))
    wanted = torch.autograd.grad(theirs, leaves, along, retain_graph=True)
    for mine, other in zip(torch.autograd.grad(ours, leaves, along), wanted, strict=True):
        size = max(0.1, float(other.abs().max()))
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("length", [1, 2, 31, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 77])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_causal_attention(length: int, heads: int, kv_heads: int) -> None:
    q, k, v = leaves = inputs(2, heads, kv_heads, length)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    compare(attend(q, k, v), theirs, leaves)
    scaled = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)
    compare(attend(q, k, v, scale=0.3), scaled, leaves)


@pytest.mark.parametrize("length", [60, BLOCK + 40])
@pytest.mark.parametrize("rows", [1, 2])
def test_packed_examples_under_a_mask(length: int, rows: int) -> None:
    q, k, v = leaves = inputs(2, 4, 2, length)
    segments = torch.arange(length).expand(rows, -1) // torch.tensor([17, 50])[:rows, None]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]
    mask = torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    compare(attend(q, k, v, mask=mask), theirs, leaves)
    out, weights = attention._interface(None, q, k, v, seen)
    assert weights is None and out.is_contiguous()
    compare(out.transpose(1, 2), theirs, leaves)


def test_frozen_inputs_and_strided_views() -> None:
    width = 8
    wide = torch.randn(2, 70, 6 * width, requires_grad=True)
    q = wide[..., : 4 * width].view(2, 70, 4, width).transpose(1, 2)
    k, v = (wide[..., at : at + width].view(2, 70, 1, width).transpose(1, 2) for at in (4 * width, 5 * width))
    compare(attend(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), [wide])
    still = [t.detach() for t in (q, k, v)]
    assert not attend(*still).requires_grad
    still[2].requires_grad_()
    ours = torch.autograd.grad(attend(*still).sum(), still[2])[0]
    theirs = torch.autograd.grad(
        F.scaled_dot_product_attention(*still, is_causal=True, enable_gqa=True).sum(), still[2])[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_it_is_as_near_as_eager_attention() -> None:
    leaves = inputs(1, 4, 2, 300, 16)
    exact = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    halves = [t.detach().bfloat16().requires_grad_() for t in leaves]
    q, k, v = halves
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) / 4
    hidden = torch.ones(300, 300, dtype=torch.bool).triu(1)
    eager = torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ v.repeat_interleave(2, 1)
    along = torch.randn_like(exact)
    right = torch.autograd.grad(exact, leaves, along)
    for mine, other, wanted in zip(torch.autograd.grad(attend(*halves), halves, along.bfloat16()),
                                   torch.autograd.grad(eager, halves, along.bfloat16()), right, strict=True):
        off = [float((t.float() - wanted).norm() / wanted.norm()) for t in (mine, other)]
        assert off[0] < 1.2 * off[1] and off[1] < 0.03


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPT2", "Gemma"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_that_uses_it_is_the_same_function(family: str, packed: bool) -> None:
    more: dict[str, Any] = {"head_dim": 8} if family == "Gemma" else {}
    if family == "GPT2":
        more = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "scale_attn_by_inverse_layer_idx": True}
    model = module(family, **more)
    given: dict[str, Any] = {"input_ids": TOKENS, "use_cache": False}
    if packed:
        segments = torch.arange(300) // 70
        seen = (segments[:, None] == segments) & torch.ones(300, 300, dtype=torch.bool).tril()
        given["attention_mask"] = torch.zeros(2, 1, 300, 300).masked_fill_(~seen, -math.inf)
        given["position_ids"] = (torch.arange(300) % 70).expand(2, -1)
    logits = model(**given).logits
    wanted = gradients(model, logits.square().mean())
    assert use(model) and model.config._attn_implementation == NAME
    ours = model(**given).logits
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients(model, ours.square().mean()).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("family", "more"), [
    ("Mistral", {"sliding_window": 64}), ("Gemma2", {"head_dim": 8}), ("Gemma3Text", {"head_dim": 8}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("Llama", {"attention_dropout": 0.1}), ("GPT2", {}), ("Falcon", {}),
])
def test_other_kinds_of_attention_are_refused_and_left(family: str, more: dict[str, Any]) -> None:
    model = module(family, **more)
    was = model.config._attn_implementation
    assert use(model) is False and model.config._attn_implementation == was


def test_attention_that_sees_the_future_or_is_not_sdpa_is_left() -> None:
    both = module("Llama")
    both.model.layers[0].self_attn.is_causal = False
    eager = module("Llama", attn_implementation="eager")
    capped = module("Llama")
    capped.config.attn_logit_softcapping = 30.0
    assert not use(both) and not use(eager) and not use(capped)


def test_what_it_cannot_do_is_said() -> None:
    q, k, v = inputs(1, 2, 2, 5)
    with pytest.raises(ValueError, match="softcap"):
        attention._interface(None, q, k, v, None, softcap=30.0)
    with pytest.raises(ValueError, match="dropout"):
        attention._interface(None, q, k, v, None, dropout=0.1)
    with pytest.raises(ValueError, match="cache"):
        attention._interface(None, q[:, :, -1:], k, v, None)
    model = module("Llama").eval()
    use(model)
    with pytest.raises(ValueError, match="cache"):
        model.generate(TOKENS[:1, :8], max_new_tokens=3, do_sample=False)
