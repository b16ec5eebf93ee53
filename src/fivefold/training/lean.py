"""Lean layers: the model's own function and gradients, with less kept for the backward pass.

What autograd keeps is what makes training large. Two of the tensors it keeps per layer are cheap to make again:

    x = norm(h)             from h, which is kept anyway for the norm's own gradient
    p = act(gate) * up      from gate and up, which are kept anyway for the product's own gradient

A lean norm or gated product marks its result with how to make it again, and a lean linear layer that reads a marked
tensor keeps the recipe instead of the tensor. Per layer and token of a Llama of width d and feed-forward width f

    kept by autograd        about  12 d + 5 f  elements (float32 norms, both the product and its factors, ...)
    kept here               about   6 d + 2 f

A frozen linear layer keeps nothing at all: its input's gradient needs only the weight. A low-rank adapter is computed
in the same pass, y = x W' + s (x A') B', and its gradients from x and the small x A'. Weights are held in the dtype
they are computed in, so that no pass casts them.

It does not help where the layers are of a kind not known here (they stay as they are; `install` says how many it
took), nor when memory is no concern: the elementwise parts are computed twice, which costs under 3 %.

Source: recomputing what is cheap, Chen et al., arXiv 1604.06174, section 4; Korthikanti et al., arXiv 2205.05198.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Again = Callable[[], torch.Tensor]
_MARK = "again"


def marked(tensor: torch.Tensor, again: Again) -> torch.Tensor:
    """`tensor`, with the way to make it again from tensors that are kept anyway."""
    setattr(tensor, _MARK, again)
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

    def again() -> torch.Tensor:
        wide = x.detach().to(torch.float32, copy=True)
        return _normed(wide, _rstd(wide, eps), weight.detach(), shift, x.dtype)

    return marked(out, again)


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
    return marked(out, lambda: F.silu(gate.detach()).mul_(up.detach()))


class _Linear(torch.autograd.Function):
    """y = x W' + b, and with an adapter + s (x A') B'. Keeps x, or the way back to it, only where a gradient needs it."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale, again):# type: ignore[no-untyped-def]
        y = F.linear(x, weight, bias)
        low = None
        if down is not None:
            small, large = down.to(x.dtype), up.to(x.dtype)
            low = F.linear(x, small)
            y.view(-1, y.shape[-1]).addmm_(low.view(-1, low.shape[-1]), large.T, alpha=scale)
        needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.again, ctx.scale = (again if needs_x else None), scale
        ctx.save_for_backward(x if needs_x and again is None else None, weight, down, up, low)
        ctx.shape, ctx.bias = x.shape, bias is not None
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, down, up, low = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        of_x = of_weight = of_bias = of_down = of_up = of_low = None
        if down is not None:
            of_low = (flat @ up.to(flat.dtype)).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            of_x = flat @ weight
            if of_low is not None:
                of_x.addmm_(of_low, down.to(flat.dtype))
            of_x = of_x.view(ctx.shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            x = (ctx.again() if ctx.again is not None else x).reshape(-1, ctx.shape[-1])
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
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, down: torch.Tensor | None = None,
    up: torch.Tensor | None = None, scale: float = 1.0,
) -> torch.Tensor:
    """x (..., inputs) -> (..., outputs); `down` (rank, inputs) and `up` (outputs, rank) are an adapter of x's layer."""
    out: torch.Tensor = _Linear.apply(x, weight, bias, down, up, scale, getattr(x, _MARK, None))
    return out


def install(module: nn.Module) -> dict[str, int]:
    """Make the known layers of `module` lean, in place; how many of each kind were taken."""
    taken = {"norm": 0, "gated": 0, "linear": 0, "adapter": 0}
    adapters = [part for part in module.modules() if _kind(part) == "adapter"]
    inside = {id(part) for whole in adapters for part in whole.modules() if part is not whole}
    for part in module.modules():
        kind = _kind(part)
        if kind and id(part) not in inside:
            part.forward = _FORWARD[kind].__get__(part)
            taken[kind] += 1
    return taken


def _kind(part: nn.Module) -> str | None:
    name = type(part).__name__
    if name.endswith("RMSNorm") and hasattr(part, "variance_epsilon" if "Gemma" not in name else "eps"):
        return "norm"
    if name.endswith("MLP") and all(hasattr(part, n) for n in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return "gated" if isinstance(part.act_fn, nn.SiLU) or type(part.act_fn).__name__ == "SiLUActivation" else None
    if type(part) is nn.Linear:
        return "linear"
    if type(part).__module__ == "peft.tuners.lora.layer" and name == "Linear" and _plain_adapter(part):
        return "adapter"
    return None


def _plain_adapter(part: Any) -> bool:
    return type(part.base_layer) is nn.Linear and not part.lora_variant and len(part.active_adapters) == 1


def _norm_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    if hasattr(self, "variance_epsilon"):
        return norm(x, self.weight, self.variance_epsilon)
    return norm(x, self.weight, self.eps, shift=1.0)


def _gated_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
    return out


def _linear_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return linear(x, self.weight, self.bias)


def _adapter_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    name, base = self.active_adapters[0], self.base_layer
    return linear(x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])


_FORWARD = {"norm": _norm_forward, "gated": _gated_forward, "linear": _linear_forward, "adapter": _adapter_forward}
