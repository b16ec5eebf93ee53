"""Calibration layer by layer: every layer sees the inputs its treated predecessors really give, one window at a time.

    for stage in stages(module, tokens):        the hidden states of all windows stand before this layer
        for names in stage.shared(parts):       its linear layers, those that read the same input together
            h = stage.hessian(first of names)   mean(x x^T) of that input
            ... change the weights ...          what comes later in the layer already sees the change

The memory is the model, the hidden states of the windows (tokens x width), and what one layer computes for one window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fivefold.techniques._shared.modules import forward, layers


class _Enough(Exception):
    """Raised by a hook when the rest of a pass is not needed."""


@dataclass(frozen=True)
class Stage:
    """One decoder layer before its treatment. `hidden` holds one (1, length, width) tensor per window."""

    number: int
    layer: Any
    hidden: list[Tensor]
    more: tuple[tuple[Any, ...], Mapping[str, Any]]

    def run(self, hidden: Tensor) -> Tensor:
        """What the layer makes of one window's hidden states."""
        args, kwargs = self.more
        with torch.no_grad():
            out = self.layer(hidden, *args, **kwargs)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first

    def shared(self, parts: Mapping[str, Any]) -> list[list[str]]:
        """Those of `parts` (name -> module) inside the layer, in the order they run; one list per distinct input."""
        inside = {id(part) for part in self.layer.modules()}
        own = {name: part for name, part in parts.items() if id(part) in inside}
        seen: list[tuple[str, Tensor]] = []
        handles = [
            part.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0])))
            for name, part in own.items()
        ]
        try:
            self.run(self.hidden[0])
        finally:
            for handle in handles:
                handle.remove()
        groups: list[tuple[Tensor, list[str]]] = []
        for name, x in seen:
            home = next((names for other, names in groups if other is x), None)
            if home is None:
                groups.append((x, [name]))
            elif name not in home:
                home.append(name)
        return [names for _, names in groups]

    def calls(self, part: Any, windows: int | None = None) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What one module inside is called with, window by window; nothing after it is computed."""
        kept: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def hook(_: Any, args: Any, kwargs: Any) -> None:
            kept.append((args, kwargs))
            raise _Enough

        handle = part.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            for hidden in self.hidden[:windows]:
                with suppress(_Enough):
                    self.run(hidden)
                yield kept.pop()
        finally:
            handle.remove()

    def inputs(self, part: Any) -> Iterator[Tensor]:
        """The inputs (tokens, columns) of one linear layer inside, window by window."""
        for args, _ in self.calls(part):
            yield args[0].detach().reshape(-1, args[0].shape[-1]).float()

    def hessian(self, part: Any) -> Tensor:
        """mean(x x^T) over all tokens, float32 (columns, columns)."""
        total: Tensor | None = None
        count = 0
        for x in self.inputs(part):
            total = x.T @ x if total is None else total.addmm_(x.T, x)
            count += len(x)
        assert total is not None
        return total / count


def stages(module: Any, tokens: Any) -> Iterator[Stage]:
    """The layers in order; what was changed in one is what the next one's inputs come from. `tokens`: (windows, n)."""
    parts = list(layers(module))
    calls = _calls(module, parts, tokens[:1])
    hidden = [_entering(module, parts[0], tokens[i : i + 1]) for i in range(len(tokens))]
    for number, layer in enumerate(parts):
        stage = Stage(number, layer, hidden, calls[number])
        yield stage
        if number + 1 < len(parts):
            for i, states in enumerate(hidden):
                hidden[i] = stage.run(states)


def _calls(module: Any, parts: list[Any], tokens: Any) -> list[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """What every layer is called with besides the hidden states: masks and positions, equal for all windows."""
    found: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []
    handles = [
        part.register_forward_pre_hook(
            lambda _, args, kwargs: found.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})),
            with_kwargs=True,
        )
        for part in parts
    ]
    try:
        forward(module, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _entering(module: Any, first: Any, tokens: Any) -> Tensor:
    kept: list[Tensor] = []

    def hook(_: Any, args: Any, kwargs: Any) -> None:
        kept.append((args[0] if args else kwargs["hidden_states"]).clone())
        raise _Enough

    handle = first.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(_Enough):
            forward(module, tokens)
    finally:
        handle.remove()
    return kept[0]
