"""Trial: a recipe with its measurements, or the sentence why not. One durable record, also when it failed.

Three rungs, each dearer than the one before: *predicted* by the cost model (nothing is built), *screened* on a small
paired sample of fidelity (built), *measured* in full in the serving engine. A screen ranks, it never reports.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from fivefold.quantity import Measurement, Quantity

EMPTY = Measurement({})
_RUNGS = ("predicted", "screen", "measurement", "paired")


class Outcome(enum.StrEnum):
    MEASURED = "measured"
    """Every metric was taken in the serving engine; the only trials that may be shown as results."""
    SCREENED = "screened"
    """Built and ranked on a small sample, then not promoted."""
    PREDICTED = "predicted"
    """The cost model dropped it before any work; `sentence` says why."""
    REFUSED = "refused"
    OUT_OF_MEMORY = "out of memory"
    TIMED_OUT = "timed out"
    CRASHED = "crashed"
    NOT_FINITE = "not finite"

    @property
    def failed(self) -> bool:
        return self not in (Outcome.MEASURED, Outcome.SCREENED, Outcome.PREDICTED)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """`made` is the one-off ledger (seconds, joules, dollars, bytes to make the artifact); `spent` is what the trial
    itself cost the study, in seconds by phase (build, screen, measure, quality, overhead, in turn). `paired` holds its
    metrics as multiples of the parent's, both measured in turn (`in_turn`), or in its context why that failed."""

    number: int
    recipe: str
    outcome: Outcome
    sentence: str = ""
    predicted: Measurement = EMPTY
    screen: Measurement = EMPTY
    measurement: Measurement = EMPTY
    paired: Measurement = EMPTY
    made: Mapping[str, Quantity] = field(default_factory=dict)
    spent: Mapping[str, float] = field(default_factory=dict)
    coverage: tuple[str, ...] = ()
    artifact: str | None = None
    at: str = ""

    def but(self, **changes: Any) -> Self:
        return replace(self, **changes)

    def value(self, metric: str) -> float | None:
        """The measured number; None unless this trial was measured in full."""
        return self.measurement.value(metric) if self.outcome is Outcome.MEASURED else None

    def to_json(self) -> dict[str, Any]:
        data = asdict(replace(self, predicted=EMPTY, screen=EMPTY, measurement=EMPTY, paired=EMPTY, made={}))
        data["made"] = {k: q.to_json() for k, q in self.made.items()}
        for rung in _RUNGS:
            data[rung] = getattr(self, rung).to_json()
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        fields = dict(data)
        for rung in _RUNGS:
            if rung != "paired" or rung in fields:
                fields[rung] = Measurement.from_json(fields[rung])
        fields["made"] = {k: Quantity.from_json(q) for k, q in fields["made"].items()}
        fields["outcome"] = Outcome(fields["outcome"])
        fields["coverage"] = tuple(fields["coverage"])
        return cls(**fields)


def estimate(trial: Trial) -> dict[str, float | None]:
    """The best that is known of each metric: measured, else screened, else predicted. To rank by, never to report."""
    rungs = (trial.predicted, trial.screen, trial.measurement)
    return {name: rung.value(name) for rung in rungs for name in rung if rung.value(name) is not None}
