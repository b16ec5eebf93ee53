"""Meters: one file per resource (compute, memory, energy, money, network), their dated books (power, prices, grid),
and what joins them: `bench` (rounds of a workload -> Measurement), `ledger` (cost to make, payback), `worker` and
`interleaved` (rounds of several artifacts taken in turn, each in its own process).

A meter knows no recipe, technique, task or study. It takes a Model and an engine's Session and returns Quantities.
What cannot be obtained is a Quantity without a value and with its reason.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fivefold.meters.bench import Bench, Workload, measure
    from fivefold.meters.energy import EnergyMeter
    from fivefold.meters.interleaved import Interleaved, Job
    from fivefold.meters.ledger import Cost, metered, payback, paybacks
    from fivefold.meters.memory import PeakMemory
    from fivefold.meters.money import Prices
    from fivefold.meters.network import CollectiveBytes

_HOME = {
    "Bench": "bench", "Workload": "bench", "measure": "bench", "EnergyMeter": "energy", "Interleaved": "interleaved",
    "Job": "interleaved", "Cost": "ledger", "metered": "ledger", "payback": "ledger", "paybacks": "ledger",
    "PeakMemory": "memory", "Prices": "money", "CollectiveBytes": "network",
}
__all__ = [
    "Bench", "CollectiveBytes", "Cost", "EnergyMeter", "Interleaved", "Job", "PeakMemory", "Prices", "Workload",
    "measure", "metered", "payback", "paybacks",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
