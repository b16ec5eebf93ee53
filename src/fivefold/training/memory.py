"""What training will take, by formula, before any of it is allocated.

    peak = process + max(weights + beside + gradients + optimiser state + activations + head, loading)

    process       what the interpreter and its libraries hold: read when training begins, what is added rehearsed
    weights       2 bytes per number in bfloat16, 4 in float32
    beside        of each trained number held as `split` or `kahan`: 2 bytes
    gradients     of all trained numbers, or of the largest tensor when the update is fused into the backward pass
    state         the optimiser's own formula
    activations   positions at once x layers x what a layer keeps (see `lean`): per position, in elements,
                      lean     2 d + 2 h + 2 k + 2 f    d width, h and k all heads and key-value heads, f
                                                        feed-forward; h + k more where heads are normed
                      plain    about 12 d + 3 h + 3 k + 5 f  (layers of a family that `lean` does not know)
                  checkpointed layers, the first ones, keep d; by the time one is made again those after it are gone
    waiting       the gradient of a head that is the embedding too, until the embedding's own is added to it
    loading       weights and, mapped while they are converted, the files they come from; then the stored float32 of one
                  tensor after the other, for what lies beside
    head          the logits of one chunk in float32 and what is made of them; the gradient of a trained head

Whatever the allocator leaves unused between tensors is counted as `SLACK` of what comes and goes, as `LOOSE` where
layers do not keep it in blocks of their own (glibc, measured on runs of 0.9 to 2.5 GB). The prediction is checked
against each run's measured peak, and both are in its record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from fivefold.model import Blueprint, TrainPlan
from fivefold.training.cross_entropy import CHUNK, TOGETHER
from fivefold.training.method import Methods, Shapes, model_shapes
from fivefold.training.optimizer import Optimizer
from fivefold.training.precision import carry_bytes

SLACK, LOOSE = 0.3, 0.85
NORMED_HEADS = ("qwen3",)
LEAN_FAMILIES = ("llama", "mistral", "qwen2", "smollm3", "granite", *NORMED_HEADS)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes by part; the allocator leaves the share `unused` of what comes and goes."""

    process: float
    weights: float
    beside: float
    gradients: float
    state: float
    activations: float
    head: float
    loading: float = 0.0
    waiting: float = 0.0
    unused: float = SLACK

    @property
    def slack(self) -> float:
        return self.unused * (self.activations + self.gradients + self.head)

    @property
    def peak(self) -> float:
        parts = (f.name for f in fields(self) if f.name not in ("loading", "unused"))
        return max(sum(getattr(self, name) for name in parts) + self.slack, self.loading)


def needs(
    blueprint: Blueprint, plan: TrainPlan, methods: Methods, *, element: int, process: float, optimizer: Optimizer,
    fused: bool, kept_layers: float | None = None, whole: bool = True, shapes: Shapes | None = None,
    stored: int = 4, same: bool = False, learned: int | None = None, entered: float | None = None,
    steps: int = 0,
) -> Needs:
    """`element` is the bytes of a weight as computed with; `kept_layers` the layers whose activations are all kept.

    `whole`: the model's own matrices are trained; `shapes` of what is trained (default: all of them). The files hold
    `stored` bytes per number, in the `same` type that is computed with or another. `learned` targets, at most, pass
    the head together (default: all positions). `entered` is what the process holds when weights are read (default:
    `process`; some of that is taken by the first steps). A run of `steps` may not reach every block (0: it does).
    """
    trained = shapes if shapes is not None else model_shapes(blueprint)
    sizes = {name: math.prod(shape) for name, shape in trained.items()}
    live = optimizer.at_once(trained, steps)
    resident = methods.saving.resident if methods.saving else sum
    width = element if whole else 4
    held = carry_bytes(plan.held) if whole and element == 2 else 0
    largest = max((sizes[name] for name in live), default=0)
    adaptation = methods.adaptation
    sizes_of_all = (math.prod(shape) for shape in model_shapes(blueprint).values())
    weights = adaptation.weight_bytes(blueprint, element) if adaptation else float(element * sum(sizes_of_all))
    gradients = 0.0
    if optimizer.needs_gradients:
        gradients = float(width * (largest if fused else sum(sizes[name] for name in live)))
    beside = float(resident([held * size for size in sizes.values()]))
    exact = beside + (4 + stored) * max(sizes.values(), default=0) if held else 0.0
    files = adaptation.mapped(blueprint, stored, same) if adaptation else float(stored * blueprint.parameters)
    twice = blueprint.tied and whole and "embedding" in live and optimizer.needs_gradients
    layers = blueprint.layers if kept_layers is None else kept_layers
    more = adaptation.kept(blueprint) if adaptation else 0.0
    per_layer = float(element * plan.at_once * (layer_elements(blueprint) + more))
    kept = max(layers, 1.0) * per_layer
    if layers < blueprint.layers:
        kept += (blueprint.layers - layers) * element * plan.at_once * blueprint.width
    if not optimizer.needs_gradients:
        kept = 2 * per_layer
    return Needs(
        loading=(process if entered is None else entered) + weights + max(files, exact), process=process,
        waiting=float(width * sizes["embedding"]) if twice else 0.0,
        unused=SLACK if adaptation is None or adaptation.blocks else LOOSE,
        weights=weights + (0 if whole else 4.0 * sum(sizes.values())),
        beside=beside, gradients=gradients,
        state=float(resident([optimizer.state_bytes(shape) for shape in live.values()])), activations=kept,
        head=_head(blueprint, min(plan.at_once, learned or plan.at_once), element,
                   whole and "embedding" in live and optimizer.needs_gradients),
    )


def layer_elements(blueprint: Blueprint) -> float:
    """Numbers one layer keeps per position until its backward pass."""
    b = blueprint
    heads, keys = b.heads * b.head_dim, b.kv_heads * b.head_dim
    if b.family in LEAN_FAMILIES:
        normed = heads + keys if b.family in NORMED_HEADS else 0
        return 2.0 * b.width + 2 * heads + 2 * keys + normed + 2 * b.ffn
    return 12.0 * b.width + 3 * heads + 3 * keys + 5 * b.ffn


def _head(blueprint: Blueprint, learned: int, element: int, trained: bool) -> float:
    chunk = min(CHUNK, learned) * blueprint.vocab * (2 * element + 8)
    kept = min(TOGETHER, learned) * blueprint.vocab * element if trained else 0
    return float(chunk + kept)
