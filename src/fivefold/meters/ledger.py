"""Two ledgers: what it costs once to make an artifact, and after how many tokens that is repaid.

    with metered() as window:
        build()
    window.cost          # seconds, CPU seconds, J, USD, bytes written, bytes over the network, peak memory

    payback [token] = cost to make / (cost per token of the parent - cost per token of the artifact)

per resource that both ledgers share (time, energy, money). It is missing, with the reason, where nothing is saved.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Self

from fivefold.machine import Machine
from fivefold.meters import money
from fivefold.meters.energy import EnergyMeter
from fivefold.meters.memory import PeakMemory
from fivefold.meters.money import Prices
from fivefold.quantity import Measurement, Method, Quantity

_UNITS = {"seconds": "s", "cpu_seconds": "s", "energy": "J", "money": "USD", "disk": "byte", "network": "byte",
          "memory": "byte"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one piece of work cost. `a + b` is the cost of both, one after the other: peaks take the larger."""

    seconds: Quantity
    cpu_seconds: Quantity
    energy: Quantity
    money: Quantity
    disk: Quantity
    network: Quantity
    memory: Quantity

    @classmethod
    def nothing(cls) -> Cost:
        return cls(**{k: Quantity(value=0, unit=u, method="counted", low=0, high=0) for k, u in _UNITS.items()})

    def __add__(self, other: Cost) -> Cost:
        mine, theirs = self.quantities(), other.quantities()
        return Cost(**{k: (_larger if k == "memory" else _plus)(mine[k], theirs[k]) for k in mine})

    def quantities(self) -> dict[str, Quantity]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def of(cls, quantities: Mapping[str, Quantity]) -> Cost:
        """The inverse of `quantities`; what is absent is missing."""
        return cls(**{k: quantities.get(k, Quantity.missing(u, "not recorded")) for k, u in _UNITS.items()})


class metered:
    """A window over the work of this process and its children; `window.cost` when it is closed.

    Bytes written and bytes over the network come from the operating system's counters; the network's are the whole
    machine's (loopback left out), so other traffic is in them.
    """

    def __init__(self, *, machine: Machine | None = None, prices: Prices | None = None) -> None:
        self.machine = machine or Machine.probe()
        self.prices = prices or Prices.load()
        self._energy, self._memory = EnergyMeter(self.machine), PeakMemory()
        self._cost: Cost | None = None

    @property
    def cost(self) -> Cost:
        if self._cost is None:
            raise RuntimeError("the window is still open")
        return self._cost

    def __enter__(self) -> Self:
        self._start, self._disk, self._network = time.perf_counter(), _written(), _network()
        self._memory.__enter__()
        self._energy.__enter__()
        return self

    def so_far(self) -> Cost:
        """What it cost since the window opened."""
        peak = Quantity(value=self._memory.so_far(), unit="byte", method="measured")
        return self._since(self._energy.so_far(), peak)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._energy.__exit__(kind, error, trace)
        self._memory.__exit__(kind, error, trace)
        self._cost = self._since(self._energy.energy, self._memory.peak)

    def _since(self, joules: Quantity, peak: Quantity) -> Cost:
        seconds = _measured(time.perf_counter() - self._start, "s")
        return Cost(
            seconds=seconds, cpu_seconds=_measured(self._energy.cpu_seconds, "s"), energy=joules,
            money=money.cost(self.prices, self.machine, seconds=seconds, joules=joules),
            disk=_since(self._disk, _written(), "this system does not count bytes written"),
            network=_since(self._network, _network(), "this system does not count network bytes"),
            memory=peak,
        )


def payback(to_make: Quantity, saving_per_token: Quantity) -> Quantity:
    """Tokens after which the cost to make is repaid. Both in the same base unit (J and J/token, ...)."""
    if to_make.value is None or saving_per_token.value is None:
        return Quantity.missing("token", to_make.reason or saving_per_token.reason, "modelled")
    if saving_per_token.value <= 0:
        return Quantity.missing("token", "never: nothing is saved per token", "modelled")
    value = to_make.value / saving_per_token.value
    least, most = saving_per_token.low, saving_per_token.high
    low = None if to_make.low is None or not most else to_make.low / most
    high = None if to_make.high is None or least is None or least <= 0 else to_make.high / least
    note = "" if least is None or least > 0 else "the saving is not sure: its interval reaches zero"
    return Quantity(value=value, unit="token", method="modelled", low=low, high=high, reason=note)


def paybacks(to_make: Cost, parent: Measurement, child: Measurement) -> dict[str, Quantity]:
    """Payback in tokens by the resources both ledgers have: seconds, energy, money."""
    pairs = {"seconds": ("latency", 1.0), "energy": ("energy", 1.0), "money": ("money", 1e-6)}
    made = to_make.quantities()
    return {
        name: payback(made[name], saving(parent[metric], child[metric], scale))
        for name, (metric, scale) in pairs.items() if metric in parent and metric in child
    }


def saving(parent: Quantity, child: Quantity, scale: float = 1.0) -> Quantity:
    """parent - child, with the widest interval the two allow."""
    if parent.value is None or child.value is None:
        return Quantity.missing(parent.unit, parent.reason or child.reason, "modelled")
    ends = (parent.low, parent.high, child.low, child.high)
    low = high = None
    if None not in ends:
        low, high = (parent.low - child.high) * scale, (parent.high - child.low) * scale  # type: ignore[operator]
    return Quantity(value=(parent.value - child.value) * scale, unit=parent.unit, method="modelled", low=low, high=high)


def _plus(a: Quantity, b: Quantity) -> Quantity:
    if a.value is None or b.value is None:
        return Quantity.missing(a.unit, a.reason or b.reason, a.method)

    def ends(x: float | None, y: float | None) -> float | None:
        if x is None and y is None:
            return None
        return (a.value or 0.0 if x is None else x) + (b.value or 0.0 if y is None else y)

    method: Method = "modelled" if "modelled" in (a.method, b.method) else "measured"
    return Quantity(value=a.value + b.value, unit=a.unit, method=method, low=ends(a.low, b.low),
                    high=ends(a.high, b.high), reason=b.reason or a.reason)


def _larger(a: Quantity, b: Quantity) -> Quantity:
    if a.value is None or b.value is None:
        return Quantity.missing(a.unit, a.reason or b.reason, a.method)
    return a if a.value >= b.value else b


def _measured(value: float, unit: str) -> Quantity:
    return Quantity(value=value, unit=unit, method="measured")


def _since(before: int | None, after: int | None, why: str) -> Quantity:
    if before is None or after is None:
        return Quantity.missing("byte", why)
    return _measured(after - before, "byte")


def _written() -> int | None:
    """Bytes this process has handed to disks so far."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("write_bytes")), None)


def _network() -> int | None:
    """Bytes sent and received by all real interfaces so far."""
    if sys.platform == "linux":  # psutil reads the same, and is 4 MB in a process whose memory is measured
        rows = [line.split(":") for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
        both = {name.strip(): int(c[0]) + int(c[8]) for name, text in rows if (c := text.split())}
    else:
        import psutil

        both = {name: c.bytes_sent + c.bytes_recv for name, c in psutil.net_io_counters(pernic=True).items()}
    wires = [n for name, n in both.items() if not name.startswith(("lo", "ifb", "docker", "veth", "br-"))]
    return sum(wires) if wires else None
