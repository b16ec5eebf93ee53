"""Evidence: how far trials departed from the physics, carried over to recipes that resemble them.

log(measured / physics) is taken to be a sum of effects: one of the engine, one of each trait in which a recipe departs
from the plain run (storage type, threads, batch, cache type, draft from the prompt). Each effect has a variance known
beforehand, small where the physics is a measured table and large where it is a rough guess, and a trial adds noise of
5 %. The expected effect given the trials is then one linear system (a Gaussian process whose kernel counts what two
recipes share, weighed by those variances):

    factor = exp(k (K + 0.05^2 I)^-1 r)       k, K shared variance;  r = log ratios of the trials

so one trial corrects every recipe of its engine, a second one of the same type corrects that type alone, and what a
trait does to speed beyond physics (a draft that is accepted) stays with that trait. It does not help where effects
multiply differently together than apart.

Source: Rasmussen & Williams, "Gaussian Processes for Machine Learning", 2006, chapter 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NOISE = 0.05
ROUGH = {"any": 1.0, "engine": 1.0, "storage": 0.3, "threads": 0.03, "batch": 0.05, "cache": 0.05, "lookup": 0.1}
"""Variances of log effects where the physics is a guess; an engine never tried then follows the others."""
TABLE = {"any": 0.0, "engine": 0.03, "storage": 0.005, "threads": 0.01, "batch": 0.05, "cache": 0.02, "lookup": 0.1}
"""The same where the times of this engine's types were measured."""
PRICE = {"any": 10.0, "engine": 0.02, "storage": 0.005, "threads": 0.02, "batch": 0.05, "cache": 0.005, "lookup": 0.02}
"""Of what a second costs (power, money): nearly the same for all engines of a machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a correction may depend on; "" is the plain run, which has no effect of its own."""

    engine: str
    storage: str
    threads: str = ""
    batch: str = ""
    cache: str = ""
    lookup: str = ""

    def shared(self, other: Traits, variance: dict[str, float]) -> float:
        found = variance["any"]
        if self.engine == other.engine:
            found += variance["engine"]
            for name in ("storage", "threads", "batch", "cache", "lookup"):
                mine = getattr(self, name)
                if mine and mine == getattr(other, name):
                    found += variance[name]
        return found


Record = tuple[Traits, float]
"""Traits of a trial and log(measured / physics)."""


class Evidence:
    """Of one metric. `variance` is ROUGH, TABLE or PRICE."""

    def __init__(self, records: Sequence[Record], variance: dict[str, float]) -> None:
        import numpy as np

        self.records, self.variance = tuple(records), variance
        self._weights: list[float] = []
        if records:
            kernel = np.array([[a.shared(b, variance) for b, _ in records] for a, _ in records])
            kernel += NOISE**2 * np.eye(len(records))
            self._weights = [float(w) for w in np.linalg.solve(kernel, np.array([r for _, r in records]))]

    def log_factor(self, traits: Traits) -> float:
        return sum(w * traits.shared(t, self.variance) for w, (t, _) in zip(self._weights, self.records, strict=True))

    def count(self, traits: Traits) -> int:
        """Trials of the same engine and type, else of the engine, else of any that bear on it."""
        same = [t for t, _ in self.records if t.engine == traits.engine]
        alike = [t for t in same if t.storage == traits.storage]
        return len(alike or same or (self.records if self.variance["any"] else ()))
