"""Letting the gate say which neurons a token needs, before the other two thirds of the feed-forward are read.

A gated feed-forward computes sum_i act(gate_i x) (up_i x) down_i. Where |act(gate_i x)| is small the neuron i adds
little, whatever up_i x is. A threshold per layer, the quantile `sparsity` of |act(gate x)| on calibration text, drops
these neurons; rows of up and down are then read for the others only. Nothing is trained, and the gate decides with its
exact value. Bytes of a feed-forward fall by 2/3 of the sparsity: the gate is always read whole, and attention is
untouched. A kernel of our own does it (`engines/native/gather.cpp`).

It pays when one token at a time is decoded and reading weights is the time, like `teal`, which also treats attention.
Prompts and scored texts are computed by the same function densely, with the zeros put in, and gain nothing; only their
first token, to which nearly all others attend, keeps all neurons. Only gated feed-forwards without biases have a gate
to ask. Their weights become bfloat16; all others stay as they are.

Source: Lee et al., CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models, arXiv 2404.08763.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search
from fivefold.techniques._shared.activation_sparsity import compiled, feed_forwards, planned

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Cats(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.FLOAT_WEIGHTS, Trait.TRAINABLE})
    lowers = {"compute": "direct", "energy": "direct", "money": "direct", "memory": "indirect", "network": "indirect"}
    headline = "SwiGLU of Llama-7B, Mistral-7B at 50%: ~15% faster decoding, tasks within 1-2% without tuning"
    perturbation = 3.5

    sparsity: Annotated[float, Range(0.0, 0.95), Search(0.3, 0.5, 0.7)] = 0.5
    """Fraction of the neurons of every feed-forward that a token leaves out."""
    windows: Annotated[int, Range(1, 4096), Fixed()] = 8
    """Calibration windows of 512 tokens."""

    def check(self, model: Model) -> None:
        feed_forwards(model, str(self))
        compiled(str(self))

    def plan(self, model: Model) -> Model:
        return planned(model)

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.activation_sparsity import neurons, stored, treated
        from fivefold.techniques._shared.calibration import windows
        from fivefold.training.module import load_module

        tokens = windows(model, self.windows)
        names, kind = feed_forwards(model, str(self))
        module = load_module(model)
        parts = treated(module, names, str(self))
        cuts = self.thresholds(module, parts, tokens)
        layers: dict[str, dict[str, Any]] = {
            name: {"kind": "selected_ffn", "activation": kind, "threshold": cuts[name], "rank": 0} for name in parts
        }
        tensors = {name: neurons(mlp) for name, mlp in parts.items()}
        said = (f"cats: {len(parts)} of {model.blueprint.layers} feed-forwards leave out {self.sparsity:g} of their"
                " neurons; attention, embedding and head dense")
        return stored(model, "cats", layers, tensors).covered(said)

    def thresholds(self, module: Any, parts: dict[str, Any], tokens: NDArray[np.int64]) -> dict[str, float]:
        """Feed-forward -> threshold of |act(gate x)| over `tokens` (rows, length), after its treated predecessors."""
        from fivefold.engines._layers._gather import cut
        from fivefold.techniques._shared.activation_sparsity import threshold, wrapped
        from fivefold.techniques._shared.modules import forward

        found: dict[str, float] = {}
        names = {id(mlp): name for name, mlp in parts.items()}

        def treat(mlp: Any, x: Any) -> Any:
            name = names[id(mlp)]
            gate = mlp.act_fn(mlp.gate_proj(x))
            found[name] = threshold(gate.abs(), self.sparsity)
            return mlp.down_proj(cut(gate, found[name]) * mlp.up_proj(x))

        with wrapped(parts.values(), lambda mlp, _: lambda x: treat(mlp, x)):
            forward(module, tokens)
        return found
