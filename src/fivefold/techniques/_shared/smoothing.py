"""Scaling columns of activations down and the same columns of weights up, without changing what a model computes.

A linear layer does not care whether a factor is in its input or in its weights: W x = (W diag(s)) (diag(1/s) x). The
1/s goes where x comes from, when that is linear in it:

    a norm        gain / s (and bias / s)         -> every linear layer that reads the norm's output
    up_proj       rows / s                        -> down_proj, which reads act(gate) * up
    v_proj        rows / s                        -> o_proj, which reads a weighted mean of v

Query heads that share a value head share its s. Which layers read a norm is seen by running a layer once; whether
nothing else does, by comparing the model's answers before and after.

Source: SmoothQuant (Xiao et al., arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TINY = 1e-5
Smoother = Callable[["Fold"], Tensor]


@dataclass(eq=False)
class Fold:
    """`source` gives what the linear layers `readers` (name -> module) read; scales are per entry of `source`.

    `spread` (entries,) -> (columns) says which entry each column of the readers belongs to, None: the same.
    `inputs` is a sample of what they read (tokens, columns), `peaks` the largest magnitude of each column on all text.
    """

    source: nn.Module
    readers: dict[str, nn.Module]
    inputs: Tensor
    peaks: Tensor
    spread: Tensor | None = None

    def matrices(self) -> list[Tensor]:
        return [part.weight.data for part in self.readers.values()]

    def scale(self, alpha: float) -> Tensor:
        """max|X|^alpha / max|W|^(1 - alpha) for every column; columns of one entry take the larger."""
        weights = torch.stack([w.float().abs().amax(0) for w in self.matrices()]).amax(0)
        x, w = self.per_entry(self.peaks).clamp_min(TINY), self.per_entry(weights).clamp_min(TINY)
        return self.per_column(x**alpha / w ** (1 - alpha))

    def per_entry(self, columns: Tensor) -> Tensor:
        if self.spread is None:
            return columns
        entries = int(self.spread.max()) + 1
        return torch.zeros(entries).scatter_reduce(0, self.spread, columns.float(), "amax")

    def per_column(self, entries: Tensor) -> Tensor:
        return entries if self.spread is None else entries[self.spread]

    def apply(self, scale: Tensor) -> None:
        """Move `scale` (columns,) from the readers' inputs into their weights, in place."""
        for weight in self.matrices():
            weight.mul_(scale.to(weight.dtype))
        _divide(self.source, self.per_entry(scale))


def _divide(source: Any, scale: Tensor) -> None:
    """Make a norm or a linear layer give its outputs / `scale`."""
    if isinstance(source, nn.Linear):
        source.weight.data.div_(scale[:, None])
    else:
        offset = gain_offset(source)
        source.weight.data.add_(offset).div_(scale).sub_(offset)
    if getattr(source, "bias", None) is not None:
        source.bias.data.div_(scale)


def gain_offset(norm: Any) -> float:
    """What the norm adds to its weight before it multiplies: 1 in the Gemma family, else 0; found by trying."""
    probe = torch.linspace(-1, 1, norm.weight.numel(), dtype=norm.weight.dtype)
    kept = norm.weight.data
    with torch.no_grad():
        norm.weight.data = torch.zeros_like(kept)
        silent = norm(probe[None])
        if getattr(norm, "bias", None) is not None:
            silent = silent - norm.bias
        norm.weight.data = kept
    return 1.0 if bool(silent.abs().max() > 0) else 0.0


def smooth(module: Any, tokens: Any, choose: Smoother, pairs: bool, sample: int = 256) -> list[Fold]:
    """Fold scales into `module` in place, layer by layer, in one pass over `tokens` (rows, length).

    `choose` gives the scales (columns,) of a fold from what its readers read in the parent. `pairs` also treats
    up_proj -> down_proj and v_proj -> o_proj. The folds come back without their samples.
    """
    from fivefold.techniques._shared.modules import forward, layers, linears

    names = {id(part): name for name, part in linears(module) if isinstance(part, nn.Linear)}
    done: list[Fold] = []

    def before(layer: nn.Module, args: Any, kwargs: Any) -> None:
        folds = list(_folds(layer, names, args, kwargs, module.config, pairs, sample))
        for fold, scale in [(fold, choose(fold)) for fold in folds]:
            fold.apply(scale)
            fold.inputs = fold.inputs[:0]
            done.append(fold)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers(module)]
    try:
        forward(module, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return done


def _folds(
    layer: nn.Module, names: Mapping[int, str], args: Sequence[Any], kwargs: Mapping[str, Any], config: Any,
    pairs: bool, sample: int,
) -> Iterator[Fold]:
    """What can be folded in a layer, seen by a trial run of it."""
    given: list[tuple[nn.Module, Tensor]] = []
    read: dict[int, Tensor] = {}
    parts = [part for part in layer.modules() if id(part) in names]

    def reading(part: nn.Module, inputs: Any) -> None:
        read.setdefault(id(part), inputs[0])

    handles = [part.register_forward_pre_hook(reading) for part in parts]
    norms = [part for part in layer.modules() if _is_norm(part, config.hidden_size)]
    handles += [n.register_forward_hook(lambda m, _, out: given.append((m, out))) for n in norms]
    try:
        layer.forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()

    def fold(source: nn.Module, readers: list[nn.Module], spread: Tensor | None = None) -> Fold:
        flat = read[id(readers[0])].detach().flatten(0, -2).float()
        step = max(1, len(flat) // sample)
        named = {names[id(part)]: part for part in readers}
        return Fold(source, named, flat[::step][:sample].clone(), flat.abs().amax(0), spread)

    for norm, out in given:
        if readers := [part for part in parts if read.get(id(part)) is out]:
            yield fold(norm, readers)
    if pairs:
        own = {names[id(part)].rpartition(".")[2]: part for part in parts}
        if own.keys() >= {"gate_proj", "up_proj", "down_proj"} and _same(own["up_proj"], own["down_proj"]):
            yield fold(own["up_proj"], [own["down_proj"]])
        if own.keys() >= {"v_proj", "o_proj"} and (spread := _heads(own["v_proj"], own["o_proj"], config)) is not None:
            yield fold(own["v_proj"], [own["o_proj"]], spread)


def _is_norm(part: Any, width: int) -> bool:
    weight = getattr(part, "weight", None)
    return "norm" in type(part).__name__.lower() and isinstance(weight, Tensor) and weight.shape == (width,)


def _same(source: Any, reader: Any) -> bool:
    return bool(source.out_features == reader.in_features)


def _heads(value: Any, out: Any, config: Any) -> Tensor | None:
    """The row of v_proj each column of o_proj comes from; None when the widths do not say it."""
    heads = config.num_attention_heads
    size, rest = divmod(out.in_features, heads)
    if rest or value.out_features % size or heads % (value.out_features // size):
        return None
    owners = torch.arange(value.out_features).view(-1, size)
    return owners.repeat_interleave(heads * size // value.out_features, 0).flatten()


def difference(module: Any, tokens: Any, before: Tensor) -> float:
    """How far the final hidden states are from `before`, relative to their size."""
    from fivefold.techniques._shared.modules import forward

    return float((forward(module, tokens).float() - before).norm() / before.norm())

