"""Decode time of each matrix in each storage type, as a share of the time of all of them in q8_0.

From the measured seconds per weight of this machine (`engines._type_speed`). The matrix that gives the logits is the
head, which costs differently from a layer's; an embedding that is only looked up costs nothing. What does not depend
on types (norms, attention, barriers) is in neither side of the share.

Source: measured; the share is the second budget of `solver`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fivefold.engines._synthetic import kind_for
from fivefold.engines._type_speed import BASE, TypeSpeeds
from fivefold.techniques._shared.gguf_types import EMBEDDING, HEAD, bits

Shapes = Mapping[str, tuple[int, int]]


def shares(shapes: Shapes, types: Mapping[str, Sequence[str]], speeds: TypeSpeeds) -> dict[str, dict[str, float]]:
    """Exported name -> type -> share; (rows, columns) in `shapes`."""
    base = sum(_seconds(shapes, name, kind_for(BASE, columns), speeds) for name, (_, columns) in shapes.items())
    return {name: {kind: _seconds(shapes, name, kind, speeds) / base for kind in kinds}
            for name, kinds in types.items()}


def least(shapes: Shapes, types: Mapping[str, Sequence[str]], speeds: TypeSpeeds, average: float) -> float:
    """The least share within `average` bits per weight, were matrices divisible: what no choice can undercut."""
    from scipy.optimize import linprog

    share = shares(shapes, types, speeds)
    groups: Counter[tuple[tuple[str, float, float], ...]] = Counter()
    for name, kinds in types.items():
        weights = shapes[name][0] * shapes[name][1]
        groups[tuple((k, bits(k), share[name][k] / weights) for k in kinds)] += weights
    columns = [(i, size, b, s) for i, (kinds, size) in enumerate(groups.items()) for _, b, s in kinds]
    total = groups.total()
    found = linprog(
        [size * s for _, size, _, s in columns], A_ub=[[size / total * b for _, size, b, _ in columns]], b_ub=[average],
        A_eq=[[float(i == row) for i, *_ in columns] for row in range(len(groups))], b_eq=[1.0] * len(groups),
        bounds=(0, 1),
    )
    if not found.success:
        raise ValueError(f"no types keep {average:g} bits per weight")
    return float(found.fun)


def _seconds(shapes: Shapes, name: str, kind: str, speeds: TypeSpeeds) -> float:
    head = HEAD if HEAD in shapes else EMBEDDING
    if name == EMBEDDING and name != head:
        return 0.0
    rows, columns = shapes[name]
    return speeds.matrix_seconds(kind, rows * columns, head=name == head)
