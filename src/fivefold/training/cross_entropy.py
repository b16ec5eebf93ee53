"""The loss of the next token, without ever holding the logits of all tokens.

For hidden states h (n, d), head W (v, d) and targets y the loss is the mean of logsumexp(h W') - (h W')_y. One float32
copy of the logits of 1,024 tokens over 49,152 words is 201 MB, and a straightforward backward pass holds three. The
gradients follow from the logits alone,

    g = (softmax(h W') - onehot(y)) / n          dh = g W          dW = g' h

so a chunk of tokens is carried through to its gradients in the forward pass and its logits are dropped:
`CHUNK` x v x 4 bytes at a time. Exact: nothing is approximated. Rows whose target is `IGNORE` (the prompt, when the
loss is on answers only) never reach the head, which saves their share of its arithmetic too. Any loss that is a sum
over tokens of a function of their logits goes the same way (`through_head`; `divergence` has those of distillation).

It does not help when the vocabulary is small or the head is a small part of the model.

Source: the chunked and fused form is Cut Cross-Entropy's observation, Wijmans et al., arXiv 2411.09009; here in torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Slope = Callable[[torch.Tensor, slice, torch.Tensor | None], torch.Tensor]
"""(float32 logits of some rows; which rows; where their gradient is written, None: nowhere) -> sum of the losses."""

IGNORE = -100
CHUNK = 128
TOGETHER = 1024
"""Tokens whose logit gradients are kept (in the head's dtype) for one product with the hidden states."""


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, slope, scale):  # type: ignore[no-untyped-def]
        trains_hidden, trains_head = ctx.needs_input_grad[:2]
        of_hidden = torch.empty_like(hidden) if trains_hidden else None
        of_weight = None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for first in range(0, len(hidden), TOGETHER):
            block = hidden[first : first + TOGETHER]
            kept = block.new_empty(len(block), len(weight)) if trains_head else None
            for at in range(0, len(block), CHUNK):
                rows, near = slice(first + at, first + at + CHUNK), slice(at, at + CHUNK)
                if kept is not None:
                    gradient = kept[near]
                else:
                    gradient = block.new_empty(len(block[near]), len(weight)) if trains_hidden else None
                total += slope((block[near] @ weight.T).float(), rows, gradient)
                if trains_hidden:
                    torch.mm(gradient, weight, out=of_hidden[rows])
            if kept is not None:
                part = kept.T @ block
                of_weight = part if of_weight is None else of_weight.float().add_(part)
        ctx.save_for_backward(of_hidden, None if of_weight is None else of_weight.to(weight.dtype))
        ctx.scale = scale
        return total * scale

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        factor = float(grad) * ctx.scale
        return (*(None if g is None else g.mul_(factor) for g in ctx.saved_tensors), None, None)


def through_head(hidden: torch.Tensor, weight: torch.Tensor, slope: Slope, scale: float) -> torch.Tensor:
    """scale x the sum of `slope` over all rows of the logits hidden (n, d) x weight (v, d)'; differentiable in both."""
    if not torch.is_grad_enabled():
        weight = weight.detach()
    total: torch.Tensor = _HeadLoss.apply(hidden, weight, slope, scale)
    return total


def _next_token(logits: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """Sum of the losses; softmax - onehot is written into `gradient` when it is wanted."""
    logs = torch.log_softmax(logits, -1)
    rows = torch.arange(len(targets), device=targets.device)
    loss = -logs[rows, targets].sum()
    if gradient is not None:
        gradient.copy_(logs.exp_())
        gradient[rows, targets] = logs[rows, targets].sub_(1).to(gradient.dtype)
    return loss


def _capped(logits: torch.Tensor, cap: float, slope: Slope, rows: slice,
            gradient: torch.Tensor | None) -> torch.Tensor:
    """`slope` of c tanh(logits / c), whose derivative is 1 - (capped / c)^2."""
    bent = logits.div_(cap).tanh_()
    loss = slope(bent * cap, rows, gradient)
    if gradient is not None:
        gradient.mul_(bent.square_().neg_().add_(1).to(gradient.dtype))
    return loss


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, count: int | None = None, cap: float = 0.0
) -> torch.Tensor:
    """Sum of the losses over `count` (default: the targets that count), a scalar in nats; differentiable.

    hidden (..., d), weight (v, d), targets (...) with IGNORE where no loss is asked. No target at all gives 0. `cap`
    > 0 is the soft cap of the logits, cap tanh(logits / cap).
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    where = (wanted != IGNORE).nonzero().squeeze(-1)
    if len(where) < len(wanted):
        flat, wanted = flat[where], wanted[where]

    def plain(logits: torch.Tensor, rows: slice, gradient: torch.Tensor | None) -> torch.Tensor:
        return _next_token(logits, wanted[rows], gradient)

    def bent(logits: torch.Tensor, rows: slice, gradient: torch.Tensor | None) -> torch.Tensor:
        return _capped(logits, cap, plain, rows, gradient)

    return through_head(flat, weight, bent if cap else plain, 1.0 / max(1, len(wanted) if count is None else count))
