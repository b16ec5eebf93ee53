"""The bill of a request: joules, dollars, seconds, bytes, each with how it was obtained.

The worker runs one request at a time, so the process's energy window around a request is that request's energy (its
HTTP work and that of clients waiting meanwhile included: well under a per cent). Where the machine has no energy
counter the joules are modelled from CPU time (`meters.energy`), and say so. Bytes are those of the request's body and
of the answer's, without the `fivefold` block itself.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from fivefold.machine import Machine
from fivefold.meters.energy import EnergyMeter
from fivefold.meters.money import Prices, cost
from fivefold.quantity import Quantity


class Window(Protocol):
    """What is needed of an energy meter."""

    energy: Quantity
    seconds: float

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...


@dataclass(kw_only=True)
class Bill:
    """Filled while the request runs, complete when its window closes. `ttft`: seconds from the start of the work to
    the first token; `waited`: seconds in the queue before it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    waited: float = 0.0
    ttft: float | None = None
    seconds: float = 0.0
    energy: Quantity = field(default_factory=lambda: Quantity.missing("J", "the request has not finished"))

    def usage(self, ledger: Ledger, bytes_in: int, bytes_out: int) -> dict[str, Any]:
        """OpenAI's usage object, with ours beside it."""
        usd = ledger.cost(self, bytes_out)
        ours: dict[str, Any] = {
            "energy_j": self.energy.value, "energy_method": self.energy.method, "energy_low": self.energy.low,
            "energy_high": self.energy.high, "energy_note": self.energy.reason or None, "usd": usd.value,
            "usd_low": usd.low, "usd_high": usd.high, "usd_method": usd.method, "bytes_in": bytes_in,
            "bytes_out": bytes_out, "seconds": self.seconds, "ttft_s": self.ttft, "waited_s": self.waited,
        }
        return {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens, "fivefold": ours,
        }


class Ledger:
    """Opens a window per request, prices it, and keeps the totals for `/metrics`. Safe between threads."""

    def __init__(self, machine: Machine, prices: Prices) -> None:
        self.machine, self.prices = machine, prices
        self._totals: Counter[str] = Counter()
        self._lock = threading.Lock()

    def open(self) -> Window:
        """The engine has no child processes, and looking for some takes longer than a token."""
        return EnergyMeter(self.machine, cpu_clock=time.process_time)

    @contextmanager
    def window(self, bill: Bill) -> Iterator[None]:
        """Meter the block into `bill`, also when it fails or is cut short: the joules were spent all the same."""
        meter = self.open()
        try:
            with meter:
                yield
        finally:
            bill.energy, bill.seconds = meter.energy, meter.seconds
            self.add("prompt_tokens", bill.prompt_tokens)
            self.add("completion_tokens", bill.completion_tokens)
            self.add("joules", bill.energy.value or 0.0)
            self.add("usd", self.cost(bill, 0).value or 0.0)

    def cost(self, bill: Bill, bytes_out: int) -> Quantity:
        time = Quantity(value=bill.seconds, unit="s", method="measured")
        return cost(self.prices, self.machine, seconds=time, joules=bill.energy, egress_bytes=bytes_out)

    def add(self, name: str, amount: float = 1) -> None:
        with self._lock:
            self._totals[name] += amount  # type: ignore[assignment]

    def totals(self) -> dict[str, float]:
        with self._lock:
            return dict(self._totals)


HEADERS = {
    "energy_j": "X-Fivefold-Energy-J", "energy_method": "X-Fivefold-Energy-Method",
    "energy_low": "X-Fivefold-Energy-Low-J", "energy_high": "X-Fivefold-Energy-High-J", "usd": "X-Fivefold-Usd",
    "bytes_in": "X-Fivefold-Bytes-In", "bytes_out": "X-Fivefold-Bytes-Out", "seconds": "X-Fivefold-Seconds",
    "ttft_s": "X-Fivefold-Ttft-S",
}


def headers(usage: dict[str, Any]) -> dict[str, str]:
    """The same facts as headers; a fact that could not be obtained has none."""
    ours = usage["fivefold"]
    shown = {name: ours[key] for key, name in HEADERS.items() if ours[key] is not None}
    return {name: f"{v:.6g}" if isinstance(v, float) else str(v) for name, v in shown.items()}


def exposition(totals: dict[str, float], running: int, waiting: int) -> str:
    """Prometheus text format."""
    lines = []
    for name in ("prompt_tokens", "completion_tokens", "joules", "usd", "cancelled", "rejected", "failed"):
        lines += [f"# TYPE fivefold_{name}_total counter", f"fivefold_{name}_total {totals.get(name, 0):.9g}"]
    lines.append("# TYPE fivefold_requests_total counter")
    for key in sorted(k for k in totals if k.startswith("status_")):
        lines.append(f'fivefold_requests_total{{status="{key.removeprefix("status_")}"}} {totals[key]:.9g}')
    for name, value in (("running", running), ("waiting", waiting)):
        lines += [f"# TYPE fivefold_{name} gauge", f"fivefold_{name} {value}"]
    return "\n".join(lines) + "\n"
