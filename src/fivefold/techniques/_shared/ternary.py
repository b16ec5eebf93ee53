"""Ternary weights that can be trained: latent floats that pass through rounding to -1, 0 and 1 at every step.

    W = s t,   t = clip(round(u), -1, 1)         u begins at w / s

s begins at the mean of |w| over its row or group (`absmean`), or where it is nearest to w (`least_squares`): s is then
the mean of those |w| that t keeps, |w| > s / 2, and is found by repeating that.

Rounding has no slope, so the gradient of u passes it as if it were not there (straight-through): dL/du = s dL/dW. In
units of s one learning rate means the same in every matrix. s is s0 exp(d) and d is trained too, with its exact
gradient, dL/ds = sum over the group of t dL/dW; norm gains and biases are trained as for every student.

Activations in 8 bits are rounded in training as the engine rounds them, again with the gradient passed through.

Sources: Ma et al., BitNet b1.58, arXiv 2402.17764; Li et al., Ternary Weight Networks, arXiv 1605.04711, for the
nearest scale; Bengio et al., straight-through, arXiv 1308.3432.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fivefold.engines._layers.ternary import groups_of, rounded
from fivefold.techniques._shared.students import Student
from fivefold.training.loop import Group

CODE_RATE = 4.0
"""Latent weights move in units of a code, scales and gains in units of themselves."""
ROUNDS = 12
TINY = 1e-7


class Through(torch.autograd.Function):
    """(rows, columns) u and (rows, groups) scale -> scale * t; see the module."""

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        codes = u.round().clamp_(-1, 1).to(torch.int8)
        ctx.save_for_backward(codes, scale)
        return times(codes, scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale = ctx.saved_tensors
        return times(grad, scale), (grad.view(*scale.shape, -1) * codes.view(*scale.shape, -1)).sum(-1)


def times(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(rows, columns) times (rows, groups), the latter repeated within its group."""
    return (values.view(*scale.shape, -1) * scale[:, :, None]).view(values.shape)


def absmean(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Mean magnitude of each row's groups (rows, groups), as float16 can say it and never 0."""
    rows, columns = weight.shape
    mean = weight.abs().view(rows, groups_of(columns, group), -1).mean(-1)
    return mean.clamp_min(TINY).half().float()


def least_squares(weight: torch.Tensor, group: int) -> torch.Tensor:
    """The scales (rows, groups) for which s t is nearest to the weights, from absmean on, as float16 can say them."""
    scale = absmean(weight, group)
    size = weight.abs().view(*scale.shape, -1)
    for _ in range(ROUNDS):
        kept = size > scale[:, :, None] / 2
        scale = ((size * kept).sum(-1) / kept.sum(-1).clamp_min(1)).clamp_min(TINY)
    return scale.half().float()


START = {"absmean": absmean, "least_squares": least_squares}


class TernaryStudent(Student):
    """`names` are the linear layers to make ternary; all other matrices stay as they are."""

    def __init__(
        self, model: Any, module: nn.Module, names: Iterable[str], *, group: int = 0, activations: int = 0,
        scale: str = "least_squares",
    ) -> None:
        super().__init__(model, module)
        self.group, self.learning = group, False
        self.start: dict[str, torch.Tensor] = {}
        self.u, self.gain = nn.ParameterDict(), nn.ParameterDict()
        for name in names:
            layer = module.get_submodule(name)
            weight = layer.weight.detach().float()
            start = self.start[name] = START[scale](weight, group)
            columns = weight.shape[1] // start.shape[1]
            self.u[_key(name)] = nn.Parameter(weight / start.repeat_interleave(columns, 1))
            self.gain[_key(name)] = nn.Parameter(torch.zeros_like(start))
            if activations:
                layer.register_forward_pre_hook(self._round)

    def _round(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if not self.learning:
            return None  # the teacher, which may be the same module
        x, *rest = args
        return (x + (rounded(x.float()) - x).detach().to(x.dtype), *rest)

    def scale(self, name: str) -> torch.Tensor:
        return self.start[name] * self.gain[_key(name)].exp()

    def weights(self) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": Through.apply(self.u[_key(name)], self.scale(name)) for name in self.start}

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        self.learning = True
        try:
            return super().logits(tokens)
        finally:
            self.learning = False

    def groups(self) -> list[Group]:
        gains = {f"gain.{name}": p for name, p in self.gain.items()}
        latent = {f"u.{name}": p for name, p in self.u.items()}
        return [Group(parameters={**self.vectors, **gains}), Group(parameters=latent, rate=CODE_RATE)]

    @torch.no_grad()
    def ternary(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes -1, 0, 1, scale as float16 can say it) of a layer."""
        return self.u[_key(name)].round().clamp(-1, 1).to(torch.int8), self.scale(name).half().float()

    def vectors_on_disk(self) -> dict[str, Any]:
        """The stored tensors with the trained vectors in their places."""
        return self._vectors_on_disk()


def _key(name: str) -> str:
    return name.replace(".", "/")
