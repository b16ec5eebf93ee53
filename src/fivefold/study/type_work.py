"""How many weights of each storage type a planned file makes llama.cpp read per token: what a table of times needs.

A plan with one type says it outright; a GGUF file that is served as it is says it in its header. A technique that
spreads an average of b bits over the matrices decides only while it builds: until then the need for bits is taken to be
normal around one centre with a spread of SPREAD, each matrix to get the nearest type its rows can hold, and the centre
is put where the average is b.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fivefold.engines._synthetic import Shape, kind_for
from fivefold.model import Blueprint, Model
from fivefold.techniques._shared.gguf_types import EMBEDDING, HEAD, bits

SPREAD = 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Type -> weights in the layers, and in the matrix that gives the logits."""

    layers: Mapping[str, float]
    head: Mapping[str, float]

    def scaled(self, factor: float) -> Work:
        return Work(layers={t: n * factor for t, n in self.layers.items()},
                    head={t: n * factor for t, n in self.head.items()})


def planned_work(planned: Model) -> Work:
    """Of a plan to write one type, with its departures and its embedding's type."""
    plan, blueprint = planned.export, planned.blueprint
    layers: Counter[str] = Counter()
    for name, (rows, columns) in _layer(blueprint).items():
        for i in range(blueprint.layers):
            layers[plan.types.get(f"blk.{i}.{name}.weight", plan.default)] += rows * columns
    head = (plan.embedding or plan.default) if blueprint.tied else plan.default
    head = plan.types.get(EMBEDDING if blueprint.tied else HEAD, head)
    return Work(layers=layers, head={head: blueprint.vocab * blueprint.width})


def stored_work(model: Model) -> Work:
    """Of a GGUF file as it is."""
    from fivefold.weights import gguf_header

    layers: Counter[str] = Counter()
    matrices = {t.name: t for t in gguf_header(model.path).tensors if len(t.shape) == 2}
    last = HEAD if HEAD in matrices else EMBEDDING
    for name, tensor in matrices.items():
        if name not in (HEAD, EMBEDDING):
            layers[tensor.type.lower()] += math.prod(tensor.shape)
    return Work(layers=layers, head={matrices[last].type.lower(): math.prod(matrices[last].shape)})


def spread_work(blueprint: Blueprint, average: float, kinds: Mapping[int, Sequence[str]]) -> Work:
    """Of matrices that share `average` bits per weight; `kinds` are the types for each width of rows."""
    widths: Counter[int] = Counter()
    for rows, columns in _layer(blueprint).values():
        widths[columns] += blueprint.layers * rows * columns
    table = blueprint.vocab * blueprint.width
    all_widths = widths + Counter({blueprint.width: table * (1 if blueprint.tied else 2)})

    def mean(centre: float) -> float:
        spent = sum(n * share * bits(kind) for width, n in all_widths.items()
                    for kind, share in _nearest(centre, kinds[width]).items())
        return spent / all_widths.total()

    low, high = -8.0, 24.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < average else (low, middle)
    layers: Counter[str] = Counter()
    for width, n in widths.items():
        for kind, share in _nearest(low, kinds[width]).items():
            layers[kind] += n * share  # type: ignore[assignment]
    head = {kind: table * share for kind, share in _nearest(low, kinds[blueprint.width]).items()}
    return Work(layers=layers, head=head)


def base_work(blueprint: Blueprint) -> Work:
    """Of the same matrices in q8_0."""
    layers: Counter[str] = Counter()
    for rows, columns in _layer(blueprint).values():
        layers[kind_for("q8_0", columns)] += blueprint.layers * rows * columns
    return Work(layers=layers, head={kind_for("q8_0", blueprint.width): blueprint.vocab * blueprint.width})


def _nearest(centre: float, kinds: Sequence[str]) -> dict[str, float]:
    """Type -> probability that it is the nearest in bits to a normal need around `centre`."""
    ordered = sorted(kinds, key=bits)
    below = [_normal(((bits(a) + bits(b)) / 2 - centre) / SPREAD) for a, b in pairwise(ordered)]
    edges = [0.0, *below, 1.0]
    return {kind: edges[i + 1] - edges[i] for i, kind in enumerate(ordered)}


def _normal(x: float) -> float:
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


def layer_shape(blueprint: Blueprint) -> Shape:
    """The widths themselves, however large."""
    return Shape(width=blueprint.width, heads=blueprint.heads, kv_heads=blueprint.kv_heads,
                 head_dim=blueprint.head_dim, ffn=blueprint.ffn)


def _layer(blueprint: Blueprint) -> dict[str, tuple[int, int]]:
    sizes = layer_shape(blueprint).matrices()
    return {name: size for name, size in sizes.items() if blueprint.gated or name != "ffn_gate"}
