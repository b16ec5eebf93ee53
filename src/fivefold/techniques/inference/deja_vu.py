"""Predicting which neurons a token will need, so that of gate, up and down only their rows are read.

Most of what a feed-forward adds for one token comes from a part of its neurons, and which part can be guessed from the
layer's input. A small predictor per layer, scores = expand (reduce x) + offset, is fitted on calibration text to the
square root of |h_i| |down_i| (ridge regression cut to `rank`, see `_shared/neuron_predictor`; the paper learns
yes-or-no labels, which was worse here). A threshold per layer on the scores leaves out `sparsity` of the neurons on
average. Layers are treated first to last, each on the inputs its treated predecessors give. Recall is the share of the
neurons that really are the layer's largest which the predictor chose; chance gives 1 - sparsity.

Bytes of a feed-forward fall by the sparsity, less the predictor's rank (width + neurons) weights: at rank 32 and a
width of 576 with 1536 neurons that is 2.5 % of the feed-forward. Attention is untouched (the paper also predicts heads,
which matters at long contexts, and runs its predictor one layer ahead, which a CPU that waits for memory does not gain
from). A wrong guess costs quality that `cats` and `teal`, which look at the true values, do not lose; the paper's
models used ReLU and were sparse by themselves, those with smooth gates are less so. Prompts and scored texts are
computed by the same function densely and gain nothing; only their first token keeps all neurons.

Source: Liu et al., Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time, arXiv 2310.17157.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fivefold.errors import DataError, Misfit
from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search
from fivefold.techniques._shared.activation_sparsity import compiled, feed_forwards, planned

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fivefold.techniques._shared.neuron_predictor import Predictor

TOKENS_PER_RANK = 8


@dataclass(frozen=True, kw_only=True)
class DejaVu(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.FLOAT_WEIGHTS, Trait.TRAINABLE})
    lowers = {"compute": "direct", "energy": "direct", "money": "direct"}
    may_raise = ("memory", "network")
    headline = "OPT-175B: >2x lower latency at ~75% contextual sparsity"
    perturbation = 4.0

    sparsity: Annotated[float, Range(0.0, 0.95), Search(0.25, 0.4, 0.5)] = 0.4
    """Fraction of the neurons of every feed-forward that a token leaves out."""
    rank: Annotated[int, Range(1, 1024, log=True), Search(32, 64)] = 32
    """Numbers between the input and the scores of a predictor."""
    windows: Annotated[int, Range(1, 4096), Fixed()] = 16
    """Calibration windows of 512 tokens."""

    def check(self, model: Model) -> None:
        feed_forwards(model, str(self))
        compiled(str(self))
        if self.rank > model.blueprint.width:
            raise Misfit(f"{self}: a rank above the width of {model.blueprint.width} gains nothing; lower rank")

    def plan(self, model: Model) -> Model:
        b = model.blueprint
        return planned(model, more=b.layers * self.rank * (b.width + b.ffn))

    def effort(self, model: Model) -> float:
        b, tokens = model.blueprint, 512.0 * self.windows
        return b.layers * b.width * (2.0 * tokens * (b.width + b.ffn) + 4.0 * b.width * b.ffn)

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.activation_sparsity import bfloat16, neurons, stored, treated
        from fivefold.techniques._shared.calibration import windows
        from fivefold.training.module import load_module

        tokens = windows(model, self.windows)
        if tokens.size < TOKENS_PER_RANK * self.rank:
            raise DataError(
                f"{self}: {tokens.size} calibration tokens are too few to fit a predictor of rank {self.rank};"
                f" {TOKENS_PER_RANK * self.rank} are needed, give more windows or lower rank"
            )
        names, kind = feed_forwards(model, str(self))
        module = load_module(model)
        parts = treated(module, names, str(self))
        found = self.predictors(module, parts, tokens)
        layers: dict[str, dict[str, Any]] = {}
        tensors: dict[str, dict[str, Any]] = {}
        for name, (predictor, cut, _) in found.items():
            layers[name] = {"kind": "selected_ffn", "activation": kind, "threshold": cut, "rank": self.rank}
            tensors[name] = {
                **neurons(parts[name]), "reduce": bfloat16(predictor.reduce),
                "expand": bfloat16(predictor.expand, turn=True), "offset": predictor.offset,
            }
        mean = sum(score for *_, score in found.values()) / len(found)
        said = (f"deja_vu: {len(parts)} of {model.blueprint.layers} feed-forwards leave out {self.sparsity:g} of their"
                f" neurons, recall {mean:.3f} on the calibration text; attention, embedding and head dense")
        return stored(model, "deja_vu", layers, tensors).covered(said)

    def predictors(
        self, module: Any, parts: dict[str, Any], tokens: NDArray[np.int64]
    ) -> dict[str, tuple[Predictor, float, float]]:
        """Feed-forward -> its predictor, the threshold of its scores, and its recall, over `tokens` (rows, length)."""
        from fivefold.engines._layers._gather import without
        from fivefold.techniques._shared.activation_sparsity import threshold, wrapped
        from fivefold.techniques._shared.modules import forward
        from fivefold.techniques._shared.neuron_predictor import fit, largest, recall, sizes

        found: dict[str, tuple[Predictor, float, float]] = {}
        names = {id(mlp): name for name, mlp in parts.items()}

        def treat(mlp: Any, x: Any) -> Any:
            name = names[id(mlp)]
            hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            rows = x.flatten(0, 1).float()
            size = sizes(hidden.flatten(0, 1).float(), mlp.down_proj.weight.float())
            predictor = fit(rows, size.sqrt(), self.rank).rounded()
            scores = predictor.scores(rows)
            cut = threshold(scores, self.sparsity) if self.sparsity else -1e29
            chosen = scores > cut
            found[name] = predictor, cut, recall(chosen, largest(size, 1 - self.sparsity))
            return mlp.down_proj(without(hidden, ~chosen.view_as(hidden)))

        with wrapped(parts.values(), lambda mlp, _: lambda x: treat(mlp, x)):
            forward(module, tokens)
        return found
