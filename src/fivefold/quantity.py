"""A number that says how it was obtained.

Three methods: *measured* (a clock, a counter of the operating system, a score on data), *counted* (exact by
construction: bytes of a file, operations of a graph) and *modelled* (computed from other numbers by stated
assumptions). What could not be obtained is `value=None` with its reason, never 0.

The interval of a median needs no distribution: for n sorted samples the probability that the true median lies
between the i-th smallest and the i-th largest follows from Binomial(n, 1/2), so the interval is the tightest
pair of order statistics with at least 95 % coverage. With n < 6 no pair reaches 95 %: the interval is then the
full range, and `n` lets the reader judge it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Method = Literal["measured", "counted", "modelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    value: float | None
    unit: str
    method: Method
    n: int = 1
    low: float | None = None
    high: float | None = None
    reason: str = ""

    @classmethod
    def missing(cls, unit: str, reason: str, method: Method = "measured") -> Quantity:
        return cls(value=None, unit=unit, method=method, n=0, reason=reason)

    @classmethod
    def median_of(cls, samples: Sequence[float], unit: str, method: Method = "measured") -> Quantity:
        """Median of the samples with its distribution-free 95 % interval."""
        if not samples:
            raise ValueError("median_of needs at least one sample")
        ordered = sorted(float(s) for s in samples)
        n = len(ordered)
        middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        rank = 0
        tail = 0.0
        for i in range(n // 2):
            tail += math.comb(n, i) / 2**n
            if 2 * tail > 0.05:
                break
            rank = i
        return cls(value=middle, unit=unit, method=method, n=n, low=ordered[rank], high=ordered[n - 1 - rank])

    def scaled(self, factor: float, unit: str, method: Method | None = None) -> Quantity:
        """The same quantity in another unit; the interval scales with it."""

        def times(x: float | None) -> float | None:
            return None if x is None else x * factor

        low, high = times(self.low), times(self.high)
        if factor < 0:
            low, high = high, low
        return Quantity(
            value=times(self.value), unit=unit, method=method or self.method, n=self.n, low=low, high=high,
            reason=self.reason,
        )

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v not in ("", None) or k == "value"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Quantity:
        return cls(**data)


@dataclass(frozen=True)
class Measurement(Mapping[str, Quantity]):
    """A closed window: metric name (see `metrics.py`) -> Quantity, and the context it was taken in.

    `context` holds what a reader needs to repeat it: workload, engine and its version, machine id, date.
    """

    quantities: Mapping[str, Quantity]
    context: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Quantity:
        return self.quantities[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.quantities)

    def __len__(self) -> int:
        return len(self.quantities)

    def __hash__(self) -> int:
        return id(self)

    def value(self, name: str) -> float | None:
        """The bare number, or None when it is absent or could not be obtained."""
        quantity = self.quantities.get(name)
        return None if quantity is None else quantity.value

    def merged(self, other: Measurement) -> Measurement:
        return Measurement({**self.quantities, **other.quantities}, {**self.context, **other.context})

    def to_json(self) -> dict[str, Any]:
        return {"quantities": {k: q.to_json() for k, q in self.quantities.items()}, "context": dict(self.context)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        return cls(
            {k: Quantity.from_json(q) for k, q in data["quantities"].items()}, dict(data.get("context", {}))
        )
