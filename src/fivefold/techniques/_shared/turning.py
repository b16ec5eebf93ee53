"""Learning rotations: a model whose matrices are turned, rounded as the file will round them, and differentiable.

    W(R) = turned weight        y = x round(W(R))^T        dL/dW taken through the rounding as if it were not there

Every linear layer turns and rounds its own matrix when it runs, and again in the backward pass, so beside the model
only one layer's copy exists at a time.

Rotations move on the orthogonal group. With G the gradient at R, A = G R^T - R G^T is skew and

    R <- (I + a/2 A)^-1 (I - a/2 A) R            (Cayley)

is orthogonal again and goes downhill. A is averaged over steps (momentum) and scaled so that the root mean square
angle of a step is the learning rate: the loss may be in any unit.

Sources: Liu et al., SpinQuant, arXiv 2405.16406; Li, Fuxin, Todorovic, Cayley SGD, arXiv 2002.01113.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fivefold.techniques._shared.rotation import Place, Rotation, place
from fivefold.training.optimizer import Optimizer
from fivefold.training.precision import Dice, State

MOMENTUM = 0.5


class Cayley(Optimizer):
    """For parameters (..., n, n) that are orthogonal."""

    def state(self, parameter: torch.Tensor) -> State:
        return {"skew": torch.zeros_like(parameter)}

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        return 4 * math.prod(shape)

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: State, beside: State, rate: float, step: int,
        dice: Dice | None,
    ) -> None:
        away = gradient.float() @ weight.mT
        state["skew"].mul_(MOMENTUM).add_(away - away.mT)
        skew = state["skew"].double()
        angle = skew.square().sum((-2, -1), keepdim=True).div(skew.shape[-1]).sqrt()
        half = skew * (rate / 2 / angle.clamp_min(1e-30))
        one = torch.eye(skew.shape[-1], dtype=torch.float64)
        weight.copy_(torch.linalg.solve(one + half, (one - half) @ weight.double()))


def orthogonal(near: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrices nearest to `near` (..., n, n), in float64: what float32 steps lost is put right."""
    left, _, right = torch.linalg.svd(near.double())
    out: torch.Tensor = left @ right
    return out


def rounding(type: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A matrix (rows, columns) as it comes out of ggml's storage type, by ggml's own code."""
    from fivefold.engines._quantize import dequantize, quantize

    def rounded(matrix: torch.Tensor) -> torch.Tensor:
        values = matrix.contiguous().numpy()
        return torch.from_numpy(dequantize(quantize(values, type), type, values.shape))

    return rounded


class Turned(nn.Module):
    """`module` under a rotation: its own logits (`exact`), and those of the turned and rounded matrices (`logits`).

    Where the residual stream is turned, norm gains are folded into `module` and everything is rounded; else only the
    matrices that heads turn are.
    """

    def __init__(self, module: Any, start: Rotation, type: str) -> None:
        super().__init__()
        self.module, self.rounded = module, rounding(type)
        self.residual = nn.Parameter(start.residual.float().clone()) if start.residual is not None else None
        self.heads = nn.Parameter(start.heads.float().clone()) if start.heads is not None else None
        if self.residual is not None:
            fold_norms(module)
        self.parts = [(part, where) for name, part in module.named_modules()
                      if (where := place(f"{name}.weight", "model.")) is not None and self._turns(where)]

    def _turns(self, where: Place) -> bool:
        return where.kind in ("v", "o") if self.residual is None else where.kind != "norm"

    def rotations(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in (("residual", self.residual), ("heads", self.heads)) if p is not None}

    def rotation(self) -> Rotation:
        """As it is now, orthogonal to the last digit."""
        found = {name: orthogonal(p.detach()) for name, p in self.rotations().items()}
        return Rotation(residual=found.get("residual"), heads=found.get("heads"))

    def exact(self, tokens: torch.Tensor) -> torch.Tensor:
        """The model's own logits."""
        with torch.no_grad():
            out: torch.Tensor = self.module(tokens, use_cache=False).logits
        return out

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of the turned and rounded model."""
        with self._turned():
            out: torch.Tensor = self.module(tokens, use_cache=False).logits
        return out

    @contextmanager
    def _turned(self) -> Iterator[None]:
        for part, where in self.parts:
            part.forward = self._forward(part, where)
        try:
            yield
        finally:
            for part, _ in self.parts:
                del part.forward

    def _forward(self, part: Any, where: Place) -> Callable[[torch.Tensor], torch.Tensor]:
        looked_up = where.kind == "embedding"

        def run(inputs: torch.Tensor) -> torch.Tensor:
            if looked_up:
                return self._embedding(part, where, inputs)
            bias = None
            if part.bias is not None:
                with torch.autocast("cpu", enabled=False):
                    bias = self._now().turn(where, part.bias, None)
            return _Linear.apply(inputs, part.weight, bias, where, self.rounded, self.residual, self.heads)

        return run

    def _now(self) -> Rotation:
        return Rotation(residual=self.residual, heads=self.heads)

    def _embedding(self, part: Any, where: Place, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            rows = self._now().turn(where, part.weight[tokens.reshape(-1)], None)
        seen = rows + (self.rounded(rows.detach()) - rows).detach()
        scale = getattr(part, "embed_scale", 1.0)
        return seen.view(*tokens.shape, -1) * scale


class _Linear(torch.autograd.Function):
    """Turn, round, multiply; backward turns and rounds again, so that no turned matrix is kept."""

    @staticmethod
    def forward(ctx: Any, inputs, weight, bias, where, rounded, residual, heads) -> torch.Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inputs, weight, residual, heads)
        ctx.where, ctx.rounded, ctx.biased = where, rounded, bias is not None
        with torch.autocast("cpu", enabled=False):
            turned = rounded(Rotation(residual=residual, heads=heads).turn(where, weight, None))
        return F.linear(inputs, turned, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight, residual, heads = ctx.saved_tensors
        given = [None if r is None else r.detach().requires_grad_(True) for r in (residual, heads)]
        with torch.enable_grad():
            turned = Rotation(residual=given[0], heads=given[1]).turn(ctx.where, weight, None)
        rows = grad.reshape(-1, grad.shape[-1])
        back = grad @ ctx.rounded(turned.detach()).to(grad.dtype)
        through = (rows.T @ inputs.reshape(-1, inputs.shape[-1]).to(rows.dtype)).float()
        known = [r for r in given if r is not None]
        found = list(torch.autograd.grad(turned, known, through, allow_unused=True)) if turned.requires_grad else []
        found = found or [None] * len(known)
        wanted = [None if r is None else found.pop(0) for r in given]
        return back, None, rows.float().sum(0) if ctx.biased else None, None, None, *wanted


@torch.no_grad()
def fold_norms(module: Any) -> None:
    """Move the gains of the norms into the matrices that read them, the head untied; the function stays."""
    plus = module.config.model_type == "gemma"
    head = module.get_output_embeddings()
    if head.weight is module.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    parts = dict(module.named_modules())
    norms = set()
    for name, part in parts.items():
        where = place(f"{name}.weight", "model.")
        if where is not None and where.norm is not None:
            norm = where.norm.removesuffix(".weight")
            part.weight.mul_(parts[norm].weight + (1.0 if plus else 0.0))
            norms.add(norm)
    for norm in norms:
        parts[norm].weight.fill_(0.0 if plus else 1.0)
