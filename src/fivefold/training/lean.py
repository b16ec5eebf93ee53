"""Lean layers: the model's own function and gradients, with less kept for the backward pass.

What autograd keeps is what makes training large. Two of the tensors it keeps per layer are cheap to make again:

    x = norm(h)             from h, which is kept anyway for the norm's own gradient
    p = act(gate) * up      from gate and up, which are kept anyway for the product's own gradient

A lean norm or gated product marks its result with how to make it again, and a lean linear layer that reads a marked
tensor keeps the recipe instead of the tensor. Kept per layer and token of a Llama are then 2 d + 2 h + 2 k + 2 f
numbers (d width, h and k all heads and key-value heads, f feed-forward width); autograd by itself also keeps the norms'
float32 copies and results, the product beside its factors, and more.

A frozen linear layer keeps nothing at all: its input's gradient needs only the weight. A low-rank adapter is computed
in the same pass, y = x W' + s (x A') B', and its gradients from x and the small x A'. Weights are held in the dtype
they are computed in, so that no pass casts them.

It does not help where the layers are of a kind not known here (they stay as they are; `install` says how many it
took), nor when memory is no concern: the elementwise parts are computed twice.

Source: recomputing what is cheap, Chen et al., arXiv 1604.06174, section 4; Korthikanti et al., arXiv 2205.05198.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Again = Callable[..., torch.Tensor]
_MARK = "again"


def marked(tensor: torch.Tensor, again: Again, *sources: torch.Tensor) -> torch.Tensor:
    """`tensor`, with the way to make it again, `again(*sources)`, from tensors that are kept anyway.

    A reader keeps the sources as autograd's saved tensors, so that a checkpoint around the layer can drop them too.
    """
    setattr(tensor, _MARK, (again, sources))
    return tensor


def _rstd(wide: torch.Tensor, eps: float) -> torch.Tensor:
    return wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()


def _normed(wide: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, shift: float, dtype: Any) -> torch.Tensor:
    return wide.mul_(rstd).mul_(weight.float() + shift).to(dtype)


class _Norm(torch.autograd.Function):
    """x (..., d) -> (weight + shift) * x / rms(x); float32 inside."""

    @staticmethod
    def forward(ctx, x, weight, eps, shift):  # type: ignore[no-untyped-def]
        wide = x.to(torch.float32, copy=True)
        rstd = _rstd(wide, eps)
        ctx.save_for_backward(x, rstd, weight)
        ctx.shift = shift
        return _normed(wide, rstd, weight, shift, x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, rstd, weight = ctx.saved_tensors
        unit = x.to(torch.float32, copy=True).mul_(rstd)
        wide = grad.to(torch.float32, copy=True)
        of_weight = (wide * unit).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        wide.mul_(weight.float() + ctx.shift)
        along = (wide * unit).mean(-1, keepdim=True)
        return wide.sub_(unit.mul_(along)).mul_(rstd).to(x.dtype), of_weight, None, None


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, shift: float = 0.0) -> torch.Tensor:
    """RMS norm over the last dimension with gain `weight + shift`; marked."""
    out: torch.Tensor = _Norm.apply(x, weight, eps, shift)

    def again(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.detach().to(torch.float32, copy=True)
        return _normed(wide, _rstd(wide, eps), weight.detach(), shift, x.dtype)

    return marked(out, again, x, weight)


class _Gated(torch.autograd.Function):
    """(gate, up) -> silu(gate) * up."""

    @staticmethod
    def forward(ctx, gate, up):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        of_up = F.silu(gate).mul_(grad)
        of_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return of_gate, of_up


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up; marked."""
    out: torch.Tensor = _Gated.apply(gate, up)
    return marked(out, lambda gate, up: F.silu(gate.detach()).mul_(up.detach()), gate, up)


class _Linear(torch.autograd.Function):
    """y = x W' + b, with an adapter + s (x A') B'. Keeps x, or the way back to it, only where a gradient needs it."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale, mark):  # type: ignore[no-untyped-def]
        ctx.unpack = weight if callable(weight) else None
        weight = weight if ctx.unpack is None else None
        y = F.linear(x, ctx.unpack() if weight is None else weight, bias)
        low = None
        if down is not None:
            small, large = down.to(x.dtype), up.to(x.dtype)
            low = F.linear(x, small)
            y.view(-1, y.shape[-1]).addmm_(low.view(-1, low.shape[-1]), large.T, alpha=scale)
        needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.again, sources = mark if needs_x and mark is not None else (None, ())
        ctx.save_for_backward(x if needs_x and mark is None else None, weight, down, up, low, *sources)
        ctx.scale = scale
        ctx.shape, ctx.bias = x.shape, bias is not None
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, down, up, low, *sources = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        of_x = of_weight = of_bias = of_down = of_up = of_low = None
        if down is not None:
            of_low = (flat @ up.to(flat.dtype)).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            of_x = flat @ (ctx.unpack() if weight is None else weight)
            if of_low is not None:
                of_x.addmm_(of_low, down.to(flat.dtype))
            of_x = of_x.view(ctx.shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            x = (ctx.again(*sources) if ctx.again is not None else x).reshape(-1, ctx.shape[-1])
        if ctx.needs_input_grad[1]:
            of_weight = flat.T @ x
        if ctx.bias and ctx.needs_input_grad[2]:
            of_bias = flat.sum(0)
        if ctx.needs_input_grad[3]:
            of_down = (of_low.T @ x).to(down.dtype)
        if ctx.needs_input_grad[4]:
            of_up = (flat.T @ low.view(-1, low.shape[-1])).mul_(ctx.scale).to(up.dtype)
        return of_x, of_weight, of_bias, of_down, of_up, None, None


def linear(
    x: torch.Tensor, weight: torch.Tensor | Again, bias: torch.Tensor | None = None,
    down: torch.Tensor | None = None, up: torch.Tensor | None = None, scale: float = 1.0,
) -> torch.Tensor:
    """x (..., inputs) -> (..., outputs); `down` (rank, inputs) and `up` (outputs, rank) are an adapter of x's layer.

    A frozen weight may be a call that makes it: it is then made anew in each pass, and not kept.
    """
    out: torch.Tensor = _Linear.apply(x, weight, bias, down, up, scale, getattr(x, _MARK, None))
    return out


def install(module: nn.Module) -> dict[str, int]:
    """Make the known layers of `module` lean, in place; how many of each kind were taken.

    A layer is known when it computes what the lean one does, which is tried out: a name alone says little.
    """
    taken = {"norm": 0, "gated": 0, "linear": 0, "adapter": 0}
    found = [(part, *_lean(part)) for part in module.modules()]
    adapters = [part for part, kind, _ in found if kind == "adapter"]
    inside = {id(part) for whole in adapters for part in whole.modules() if part is not whole}
    for part, kind, forward in found:
        if kind and id(part) not in inside:
            part.forward = forward
            taken[kind] += 1
    return taken


def _lean(part: nn.Module) -> tuple[str, Any]:
    """(kind, the lean forward) of a known layer; ("", None) of any other."""
    name = type(part).__name__
    if "forward" in vars(part):  # somebody else's already
        return "", None
    if name.endswith("RMSNorm"):
        both = (partial(_norm_of, part, shift) for shift in (0.0, 1.0))
        same = next((forward for forward in both if _is_norm(part, forward)), None)
        return ("norm", same) if same else ("", None)
    if name.endswith("MLP") and all(hasattr(part, n) for n in ("gate_proj", "up_proj", "down_proj")):
        return ("gated", partial(_gated_forward, part)) if _is_gated(part) else ("", None)
    if type(part) is nn.Linear:
        return "linear", partial(_linear_forward, part)
    if plain_adapter(part):
        return "adapter", partial(_adapter_forward, part)
    return "", None


def plain_adapter(part: Any) -> bool:
    """Whether it is a linear layer with one low-rank adapter of peft's and nothing else."""
    if type(part).__module__ != "peft.tuners.lora.layer" or type(part).__name__ != "Linear":
        return False
    name = part.active_adapters[0]
    return (
        type(part.base_layer) is nn.Linear and "forward" not in vars(part.base_layer) and not part.lora_variant
        and len(part.active_adapters) == 1 and not part.merged and not part.disable_adapters
        and isinstance(part.lora_dropout[name], nn.Identity) and part.lora_B[name].bias is None
    )


def _is_norm(part: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    weight = getattr(part, "weight", None)
    if weight is None or weight.ndim != 1:
        return False
    x = torch.sin(torch.arange(2.0 * len(weight), device=weight.device)).view(1, 2, -1).to(weight.dtype)
    return _same(part, forward, x, 1e-5 if weight.dtype == torch.float32 else 0.02)


def _is_gated(part: Any) -> bool:
    """Whether it computes down(silu(gate(x)) * up(x)), whatever the three compute."""
    stand_in = copy(part)
    stand_in._modules = part._modules | {"gate_proj": _Line(1.5, 0.1), "up_proj": _Line(-0.7, 0.4),
                                         "down_proj": _Line(1.1, -0.2)}
    return _same(stand_in, partial(_gated_forward, stand_in), torch.linspace(-3, 3, 8).view(1, 2, 4), 1e-5)


class _Line(nn.Module):
    def __init__(self, slope: float, at_zero: float) -> None:
        super().__init__()
        self.slope, self.at_zero = slope, at_zero

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.slope + self.at_zero


@torch.no_grad()
def _same(one: nn.Module, other: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tolerance: float) -> bool:
    try:
        a, b = one.forward(x).float(), other(x).float()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())


def _norm_of(self: Any, shift: float, x: torch.Tensor) -> torch.Tensor:
    return norm(x, self.weight, self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps, shift)


def _gated_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
    return out


def _linear_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return linear(x, self.weight, self.bias)


def _adapter_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    name, base = self.active_adapters[0], self.base_layer
    return linear(x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])

