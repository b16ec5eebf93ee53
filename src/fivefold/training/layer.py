"""A whole decoder layer as one step of autograd: what it keeps lies in one place, what it needs in passing in another.

    x = norm(h)      q, k, v = x W_qkv'     a = attention(rope(q), rope(k), v)      m = h + a W_o'
    z = norm(m)      g, u = z W_gu'         out = m + (silu(g) * u) W_d'

Kept until the backward pass, per position: h, q, k, v, a, m, g, u, that is 2 d + 2 (all heads) + 2 (key-value heads) +
2 f numbers; x, z and silu(g) * u are made again. Two things are gained over a chain of small steps:

- what a step keeps lies in one block per layer, used again in every step, and what it needs in passing in one workspace
  for all layers, so memory does not grow with the number of steps
- projections that read the same input are one product (their weights lie side by side, the parameters are views of
  that), and so are their adapters: 4 products forward where there were 7, or 12 where there were 21

It takes layers of the Llama kind without biases, whose projections are plain or carry a plain low-rank adapter; all
others stay as they are (`install` says how many it took). It does not help models whose layers it does not know, and on
accelerators a compiled graph is better.

Sources: Chen et al., arXiv 1604.06174; attention in blocks as in `attention`; Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from fivefold.training import attention
from fivefold.training.lean import plain_adapter

Grads = list[torch.Tensor | None]


class Room:
    """Tensors by name, made once and handed out again; grows when a larger one is asked for."""

    def __init__(self) -> None:
        self.held: dict[str, np.ndarray[Any, Any]] = {}

    def clear(self) -> None:
        """Give the memory back; no step may be under way."""
        self.held.clear()

    def take(
        self, name: str, shape: Sequence[int], like: torch.Tensor, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """An uninitialised tensor. The memory of the last one of this name."""
        dtype = dtype or like.dtype
        if like.device.type != "cpu":
            return torch.empty(tuple(shape), dtype=dtype, device=like.device)
        size = max(1, math.prod(shape) * dtype.itemsize)
        if name not in self.held or self.held[name].nbytes < size:
            self.held[name] = np.empty(size, np.uint8)
        block = torch.frombuffer(self.held[name], dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=dtype).set_(block, 0, tuple(shape))


@dataclass(eq=False)
class Projections:
    """Linear layers of one input, as one product. `adapters` are (A, B) per layer or empty; `scale` of B A."""

    parts: list[nn.Module]
    weight: torch.Tensor = field(init=False)
    adapted: bool = field(init=False)

    def __post_init__(self) -> None:
        self.adapted = not isinstance(self.parts[0], nn.Linear)
        weights = [self.base(part).weight for part in self.parts]
        if len(weights) == 1:
            self.weight = weights[0].data
            return
        self.weight = torch.cat([w.data for w in weights])
        for w, piece in zip(weights, self.weight.split([len(w) for w in weights]), strict=True):
            w.data = piece

    @staticmethod
    def base(part: Any) -> Any:
        return part if isinstance(part, nn.Linear) else part.base_layer

    def inputs(self) -> list[torch.Tensor]:
        """What autograd must see: weights, then all A, then all B."""
        found = [self.base(part).weight for part in self.parts]
        if self.adapted:
            parts: list[Any] = list(self.parts)
            name = parts[0].active_adapters[0]
            found += [p.lora_A[name].weight for p in parts] + [p.lora_B[name].weight for p in parts]
        return found

    @property
    def outputs(self) -> list[int]:
        return [len(self.base(part).weight) for part in self.parts]

    def scaled(self) -> float:
        part: Any = self.parts[0]
        return float(part.scaling[part.active_adapters[0]])

    def thin(self, given: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """All A below each other, and s B as blocks on a diagonal."""
        count = len(self.parts)
        down = torch.cat([a.detach().to(dtype) for a in given[count : 2 * count]])
        up = torch.block_diag(*[b.detach() for b in given[2 * count :]]).mul_(self.scaled()).to(dtype)
        return down, up

    def forward(
        self, x: torch.Tensor, given: Sequence[torch.Tensor], out: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """x (rows, inputs) -> out (rows, all outputs); what the adapters' backward needs."""
        torch.mm(x, self.weight.T, out=out)
        if not self.adapted:
            return out, ()
        down, up = self.thin(given, x.dtype)
        low = x @ down.T
        out.addmm_(low, up.T)
        return out, (low, down, up)

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, thin: tuple[torch.Tensor, ...], wanted: Sequence[bool],
        out: torch.Tensor,
    ) -> tuple[torch.Tensor, Grads]:
        """(the input's gradient in `out`, those of `inputs()`)."""
        count = len(self.parts)
        grads: Grads = [None] * len(wanted)
        torch.mm(grad, self.weight, out=out)
        if any(wanted[:count]):
            for i, piece in enumerate((grad.T @ x).split(self.outputs)):
                grads[i] = piece if wanted[i] else None
        if self.adapted:
            low, down, up = thin
            of_low = grad @ up
            out.addmm_(of_low, down)
            ranks = [len(a) for a in self.inputs()[count : 2 * count]]
            if any(wanted[count : 2 * count]):
                for i, piece in enumerate((of_low.T @ x).float().split(ranks)):
                    grads[count + i] = piece
            if any(wanted[2 * count :]):
                whole = (grad.T @ low).float().mul_(self.scaled())
                row = column = 0
                for i, (size, rank) in enumerate(zip(self.outputs, ranks, strict=True)):
                    grads[2 * count + i] = whole[row : row + size, column : column + rank].contiguous()
                    row, column = row + size, column + rank
        return out, grads


@dataclass(eq=False)
class Shape:
    batch: int
    length: int
    heads: int
    keys: int
    width: int

    @property
    def rows(self) -> int:
        return self.batch * self.length


class _Layer(torch.autograd.Function):
    """hidden (batch, length, d), cosines and sines (1 or batch, length, head width), mask, then all weights."""

    @staticmethod
    def forward(ctx, layer, hidden, cos, sin, mask, *given):  # type: ignore[no-untyped-def]
        s, kept, work = layer.shape(hidden), layer.kept, layer.work
        parts = layer.split(given)
        h = hidden.reshape(s.rows, -1)
        x, r1 = _norm(work, "x", h, given[0], layer.eps[0])
        qkv, thin_qkv = layer.qkv.forward(x, parts[0], work.take("qkv", (s.rows, layer.qkv.weight.shape[0]), x))
        q, k, v = layer.turned(qkv, cos, sin, s, kept)
        a = attention.forward(q, k, v, layer.scale, mask, work)
        a = kept.take("a", (s.batch, s.length, s.heads, s.width), a).copy_(a.transpose(1, 2)).view(s.rows, -1)
        m, thin_o = layer.o.forward(a, parts[1], kept.take("m", h.shape, h))
        m += h
        z, r2 = _norm(work, "x", m, given[1], layer.eps[1])
        gu, thin_gu = layer.gate_up.forward(z, parts[2], kept.take("gu", (s.rows, layer.gate_up.weight.shape[0]), z))
        p = _product(work, gu)
        out = kept.take("out", hidden.shape, h)
        thin_d = layer.down.forward(p, parts[3], out.view(h.shape))[1]
        out += m.view(hidden.shape)
        ctx.kept = (h, q, k, v, a, m, gu, r1, r2, thin_qkv, thin_o, thin_gu, thin_d, cos, sin, mask, given)
        ctx.layer, ctx.s = layer, s
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        layer, s, work = ctx.layer, ctx.s, ctx.layer.work
        h, q, k, v, a, m, gu, r1, r2, thin_qkv, thin_o, thin_gu, thin_d, cos, sin, mask, given = ctx.kept
        wanted = layer.split(ctx.needs_input_grad[5:])
        grad = grad.reshape(s.rows, -1)
        p = _product(work, gu)
        of_p, g_d = layer.down.backward(grad, p, thin_d, wanted[3], work.take("of_p", p.shape, p))
        of_gu = _product_backward(work, gu, of_p)
        z = _again(work, "x", m, r2, given[1])
        of_z, g_gu = layer.gate_up.backward(of_gu, z, thin_gu, wanted[2], work.take("of_x", h.shape, h))
        of_m, g_n2 = _norm_backward(work, of_z, m, r2, given[1], ctx.needs_input_grad[6])
        of_m += grad
        of_a, g_o = layer.o.backward(of_m, a, thin_o, wanted[1], work.take("of_a", a.shape, a))
        of_a = of_a.view(s.batch, s.length, s.heads, s.width).transpose(1, 2)
        of_qkv = layer.turned_back(attention.backward(q, k, v, layer.scale, mask, of_a, work), cos, sin, s)
        x = _again(work, "x", h, r1, given[0])
        of_x, g_qkv = layer.qkv.backward(of_qkv, x, thin_qkv, wanted[0], work.take("of_x", h.shape, h))
        of_h, g_n1 = _norm_backward(work, of_x, h, r1, given[0], ctx.needs_input_grad[5])
        of_h += of_m
        ctx.kept = None
        return None, of_h.view(s.batch, s.length, -1), None, None, None, g_n1, g_n2, *g_qkv, *g_o, *g_gu, *g_d


def _norm(
    work: Room, name: str, h: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = work.take("wide", h.shape, h, torch.float32).copy_(h)
    square = torch.mul(wide, wide, out=work.take("wide2", h.shape, h, torch.float32))
    rstd = square.mean(-1, keepdim=True).add_(eps).rsqrt_()
    return work.take(name, h.shape, h).copy_(wide.mul_(rstd).mul_(weight.detach().float())), rstd


def _again(work: Room, name: str, h: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = work.take("wide", h.shape, h, torch.float32).copy_(h)
    return work.take(name, h.shape, h).copy_(wide.mul_(rstd).mul_(weight.detach().float()))


def _norm_backward(
    work: Room, grad: torch.Tensor, h: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The input's gradient (a tensor of its own) and the gain's."""
    unit = work.take("wide", h.shape, h, torch.float32).copy_(h).mul_(rstd)
    wide = work.take("wide2", h.shape, h, torch.float32).copy_(grad)
    both = work.take("wide3", h.shape, h, torch.float32)
    of_weight = torch.mul(wide, unit, out=both).sum(0).to(weight.dtype) if wanted else None
    wide.mul_(weight.detach().float())
    along = torch.mul(wide, unit, out=both).mean(-1, keepdim=True)
    return wide.sub_(unit.mul_(along)).mul_(rstd).to(h.dtype, copy=True), of_weight


def _product(work: Room, gu: torch.Tensor) -> torch.Tensor:
    gate, up = gu.chunk(2, -1)
    out = work.take("p", gate.shape, gate)
    return torch.ops.aten.silu.out(gate, out=out).mul_(up)


def _product_backward(work: Room, gu: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradients of gate and up, side by side."""
    gate, up = gu.chunk(2, -1)
    out = work.take("of_gu", gu.shape, gu)
    of_gate, of_up = out.chunk(2, -1)
    of_up.copy_(torch.ops.aten.silu.out(gate, out=work.take("p", gate.shape, gate))).mul_(grad)
    of_gate.copy_(torch.ops.aten.silu_backward(grad.mul_(up), gate))
    return out


class Layer:
    """One decoder layer, its weights arranged for `_Layer`; `kept` is its own room, `work` that of all."""

    def __init__(self, module: Any, config: Any, work: Room) -> None:
        attn, mlp = module.self_attn, module.mlp
        self.qkv = Projections([attn.q_proj, attn.k_proj, attn.v_proj])
        self.o, self.down = Projections([attn.o_proj]), Projections([mlp.down_proj])
        self.gate_up = Projections([mlp.gate_proj, mlp.up_proj])
        self.norms = (module.input_layernorm, module.post_attention_layernorm)
        self.eps = tuple(n.variance_epsilon for n in self.norms)
        self.heads, self.keys = config.num_attention_heads, config.num_key_value_heads
        self.width, self.scale = attn.head_dim, float(attn.scaling)
        self.kept, self.work = Room(), work

    def shape(self, hidden: torch.Tensor) -> Shape:
        return Shape(hidden.shape[0], hidden.shape[1], self.heads, self.keys, self.width)

    def given(self) -> list[torch.Tensor]:
        parts = (self.qkv, self.o, self.gate_up, self.down)
        return [n.weight for n in self.norms] + [t for part in parts for t in part.inputs()]

    def split(self, given: Sequence[Any]) -> list[Sequence[Any]]:
        """`given` by projection, the norms left out."""
        out, at = [], 2
        for part in (self.qkv, self.o, self.gate_up, self.down):
            count = len(part.parts) * (3 if part.adapted else 1)
            out.append(given[at : at + count])
            at += count
        return out

    def turned(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, s: Shape, kept: Room
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q and k with their positions turned in, and v: (batch, heads, length, width) each."""
        out = []
        first = 0
        for name, heads in (("q", s.heads), ("k", s.keys), ("v", s.keys)):
            piece = qkv[:, first : first + heads * s.width].view(s.batch, s.length, heads, s.width).transpose(1, 2)
            first += heads * s.width
            into = kept.take(name, piece.shape, qkv)
            out.append(into.copy_(piece) if name == "v" else _turn(piece, cos, sin, into, 1.0))
        return out[0], out[1], out[2]

    def turned_back(
        self, grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, s: Shape
    ) -> torch.Tensor:
        """The gradient of `qkv` from those of q, k, v."""
        out = self.work.take("qkv", (s.rows, (s.heads + 2 * s.keys) * s.width), grads[0])
        first = 0
        for i, heads in enumerate((s.heads, s.keys, s.keys)):
            into = out[:, first : first + heads * s.width].view(s.batch, s.length, heads, s.width).transpose(1, 2)
            first += heads * s.width
            into.copy_(grads[i]) if i == 2 else _turn(grads[i], cos, sin, into, -1.0)
        return out


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, sign: float) -> torch.Tensor:
    """Rotary positions, x (batch, heads, length, width); sign -1 is the transposed turn."""
    cos, sin = cos[:, None], sin[:, None]
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out) if out.is_contiguous() else out.copy_(x * cos)
    low, high = (sin[..., :half], sin[..., half:]) if sign > 0 else (sin[..., half:], sin[..., :half])
    out[..., :half].addcmul_(x[..., half:], low, value=-sign)
    out[..., half:].addcmul_(x[..., :half], high, value=sign)
    return out


def install(module: Any, rooms: list[Room] | None = None) -> int:
    """Let the decoder layers of `module` that are known run this way; how many there are. `rooms` receives their rooms,
    which hold memory until `Room.clear`."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = module.config
    if getattr(config, "_attn_implementation", "") != attention.NAME:
        return 0
    work, taken = Room(), 0
    rooms = [] if rooms is None else rooms
    rooms.append(work)
    for part in module.modules():
        if isinstance(part, LlamaDecoderLayer) and _known(part, config):
            layer = Layer(part, config, work)
            part.forward = _forward(layer, part.forward)
            rooms.append(layer.kept)
            taken += 1
    return taken


def _known(part: Any, config: Any) -> bool:
    attn, mlp = part.self_attn, part.mlp
    linears = [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    plain = all(type(x) is nn.Linear and x.bias is None for x in linears)
    adapted = all(plain_adapter(x) and x.base_layer.bias is None for x in linears)
    hooked = any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in part.modules())
    whole = getattr(config, "partial_rotary_factor", 1.0) in (None, 1.0)
    return (plain or adapted) and not hooked and whole and config.hidden_act == "silu"


def _forward(layer: Layer, usual: Any) -> Any:
    def forward(
        hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, position_ids: Any = None,
        past_key_values: Any = None, use_cache: Any = False, position_embeddings: Any = None, **more: Any,
    ) -> torch.Tensor:
        if past_key_values is not None or not torch.is_grad_enabled():
            out: torch.Tensor = usual(hidden_states, attention_mask=attention_mask, position_ids=position_ids,
                                      past_key_values=past_key_values, use_cache=use_cache,
                                      position_embeddings=position_embeddings, **more)
            return out
        cos, sin = position_embeddings
        mask = attention.additive(attention_mask, hidden_states.dtype)
        done: torch.Tensor = _Layer.apply(layer, hidden_states, cos, sin, mask, *layer.given())
        return done

    return forward
