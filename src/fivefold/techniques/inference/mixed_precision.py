"""Every matrix its own storage type: bits go where a rounding error would change the answers most.

Matrices differ a hundredfold in what a bit is worth. For each matrix and each type its rows can hold, the KL divergence
from the unrounded model is predicted from one set of backward passes over calibration text (1/2 sum_r s_r D_r H D_r^T,
see `_shared/sensitivity`), and an exact solver picks one type per matrix so that the sum is least at the wanted average
of bits per weight. Bytes of the matrices = bits x weights / 8; the embedding counts.

With `rounding="feedback"` the error of each column is passed on to the columns not yet rounded, weighed by the same H
(`_shared/feedback`: GPTQ with a loss-aware Hessian, then scales and codes fitted again); "nearest" rounds each block
alone, weighed by H's diagonal. On SmolLM2-135M feedback lowers the measured KL by more than a third (0.161 to 0.099 at
80 MB). Preparing a model of 135 M weights takes 80 s once on two cores; then 60 s for the first budget and half of that
for others (`_shared/candidates`).

Bytes are not time: on a CPU q5_1 may cost more per weight than q8_0. `time` is a second budget, on the seconds per
weight of each type measured on this machine (`_shared/type_time`), so the choice then depends on that table.

Lowers memory and network bytes at equal quality. It does not help when one type suffices anyway (at 8 bits everything
is nearly exact), or far below 4 bits, where damages no longer add and the prediction is too hopeful. Rows not a
multiple of 256 wide have no type below 4.5 bits.

Sources: HAWQ-V3 (Yao et al., arXiv 2011.10680) for the programme; GPTQ (arXiv 2210.17323); SqueezeLLM (arXiv
2306.07629) for the Fisher weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fivefold.errors import Misfit
from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search
from fivefold.techniques._shared.gguf_types import bits as type_bits
from fivefold.techniques._shared.gguf_types import fits, matrices

WIDE = ("q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
NARROW = ("iq4_nl", "q5_0", "q5_1", "q8_0")
WINDOW = 256
JUDGING = 28_000.0
"""Operations per weight to predict the damage of all candidate types, as a share of the arithmetic rate."""
ROUNDING = {"nearest": 8_000.0, "feedback": 35_000.0, "both": 60_000.0}
"""The same to round what is chosen; much of it was rounded for another budget already."""


@dataclass(frozen=True, kw_only=True)
class MixedPrecision(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH})
    lowers = {"memory": "direct", "network": "direct", "compute": "indirect", "energy": "indirect", "money": "indirect"}
    may_raise = ("compute",)
    perturbation = 4.0

    bits: Annotated[float, Range(3.4, 8.5), Search(4.5, 4.75, 5.0, 5.5, 6.0, 6.6, 7.2)] = 5.0
    """Average bits per weight over all matrices, the embedding included."""
    rounding: Annotated[Literal["both", "feedback", "nearest"], Fixed()] = "feedback"
    """Whether later columns make up for the error of earlier ones ("feedback"), and later rows too ("both")."""
    windows: Annotated[int, Range(1, 4096), Fixed()] = 32
    """Calibration windows of 256 tokens."""
    time: Annotated[float, Range(0.0, 8.0), Search(0.0, 0.85)] = 0.0
    """Most decode time of all matrices, as a multiple of the same with every matrix in q8_0; 0 sets no limit."""

    def check(self, model: Model) -> None:
        shapes = matrices(model)
        least = sum(rows * columns * min(map(type_bits, candidates(columns))) for rows, columns in shapes.values())
        weights = sum(rows * columns for rows, columns in shapes.values())
        if least > self.bits * weights:
            raise Misfit(
                f"{self} does not fit: the rows of {model.name} cannot go below {least / weights:.2f} bits per weight"
                f" on average; set bits to {least / weights + 0.01:.2f} or more"
            )
        self._check_time(model)

    def _check_time(self, model: Model, refuse: bool = False) -> None:
        """Refuse a time that no types within `bits` reach. Where types were never timed, nothing is refused yet."""
        from fivefold.engines._type_speed import known
        from fivefold.techniques._shared.type_time import least

        speeds = known(model.blueprint) if self.time else None
        if speeds is None:
            return
        shapes = matrices(model)
        types = {name: candidates(columns) for name, (_, columns) in shapes.items()}
        reached = least(shapes, types, speeds, self.bits)
        if refuse or reached > self.time:
            raise Misfit(
                f"{self} does not fit: within {self.bits:g} bits per weight the matrices of {model.name} decode in"
                f" {reached:.3f} times the time of q8_0 at least, as measured on this machine; set time to"
                f" {reached + 0.02:.2f} or more, or allow more bits"
            )

    def inputs(self, model: Model) -> str:
        from fivefold.engines._type_speed import measured

        return measured(model.blueprint).digest if self.time else ""

    def effort_once(self, model: Model) -> float:
        return model.blueprint.parameters * (6.0 * self.windows * WINDOW + JUDGING)

    def effort(self, model: Model) -> float:
        return model.blueprint.parameters * ROUNDING[self.rounding]

    def plan(self, model: Model) -> Model:
        return model.but(export=replace(model.export, format="gguf", default="q8_0", embedding=None, types={}))

    def apply(self, model: Model) -> Model:
        from fivefold.engines._type_speed import known, measured
        from fivefold.techniques._shared.candidates import prepare
        from fivefold.techniques._shared.modules import workspace
        from fivefold.techniques._shared.solver import choose
        from fivefold.techniques._shared.type_time import shares
        from fivefold.weights import write_solved

        shapes = matrices(model)
        types = {name: candidates(columns) for name, (_, columns) in shapes.items()}
        found = prepare(model, types, windows=self.windows, length=WINDOW, rounding=self.rounding)
        cost = {name: {kind: type_bits(kind) * shapes[name][0] * shapes[name][1] for kind in kinds}
                for name, kinds in types.items()}
        weights = sum(rows * columns for rows, columns in shapes.values())
        speeds = measured(model.blueprint) if self.time else known(model.blueprint)
        share = shares(shapes, types, speeds) if speeds else {}
        limits = [(share, self.time)] if self.time else []
        try:
            chosen = choose(found.damage, (cost, self.bits * weights), *limits)
        except ValueError:
            self._check_time(model, refuse=True)
            raise
        done = found.round(chosen)
        solved = {name: (kind, done.packed[name]) for name, kind in chosen.items()}
        folder = write_solved(workspace(model, "mixed_precision"), solved)
        planned = self.plan(model)
        spent = sum(cost[name][kind] for name, kind in chosen.items()) / weights
        return planned.but(export=replace(planned.export, types=chosen, solved=folder)).covered(
            f"mixed_precision: {len(chosen)} of {len(shapes)} matrices ({_counts(chosen)}), {spent:.2f} bits per"
            f" weight, predicted KL {done.predicted:.4f}{_spent(share, chosen)}; {done.note}"
        )


def candidates(columns: int) -> tuple[str, ...]:
    """The types worth choosing among for rows of that width; f16 where not even 32 divides it."""
    if columns % 256 == 0:
        return WIDE
    return NARROW if fits("q8_0", columns) else ("f16",)


def _spent(share: Mapping[str, Mapping[str, float]], chosen: Mapping[str, str]) -> str:
    """Predicted decode time of the matrices; nothing where types were never timed on this machine."""
    return f", {sum(share[name][kind] for name, kind in chosen.items()):.2f} times q8_0's decode time" if share else ""


def _counts(chosen: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(chosen.values()).most_common())
