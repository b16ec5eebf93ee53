"""Energy and carbon: joules of a window, and the grams of CO2 behind them.

    measured   RAPL counters of the processor packages and their memory (the whole machine: keep it quiet), and
               NVML's energy counter for accelerators
    modelled   E [J] = idle x cores x wall seconds + (active - idle) x CPU seconds

`idle` and `active` are watts per hardware thread from power.toml (SPECpower servers by processor generation), so the
model charges a run for the machine being on and for the threads it kept busy. Cloud Carbon Footprint uses the same
line. It does not see clock speed, vector width or memory traffic, hence its stated uncertainty (`low`, `high`);
ratios between two runs on one machine are better than that, because the constants cancel.

    carbon [g] = kWh x PUE x grid intensity of the country [g/kWh]          (grid.toml, average, not marginal)
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fivefold.errors import UserError
from fivefold.machine import Machine, cpu_seconds, nvml, rapl_domains
from fivefold.meters._books import check_keys, number, overrides, shipped
from fivefold.quantity import Quantity
from fivefold.space import nearest

JOULES_PER_KWH = 3.6e6
POLL_SECONDS = 30.0  # a package counter wraps after minutes at full power


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerModel:
    """Watts per hardware thread; `uncertainty` is the half-width of the interval, as a share."""

    name: str
    idle: float
    active: float
    uncertainty: float

    @classmethod
    def of(cls, machine: Machine) -> PowerModel:
        """The user's own entry, else the first family of power.toml that matches the processor."""
        book = shipped("power")
        family = next(f for f in book["family"] if re.search(f["match"], f"{machine.code} {machine.cpu}"))
        values = {k: family.get(k, book.get(k)) for k in ("idle", "active", "uncertainty")}
        own = overrides("power")
        check_keys("power", own, values)
        numbers = {k: number("power", k, v) for k, v in {**values, **own}.items()}
        name = "your own power.toml" if own else str(family["name"])
        return cls(name=name, **numbers)

    def joules(self, *, wall: float, cpu: float, cores: int) -> Quantity:
        """Of a process that used `cpu` CPU seconds in `wall` seconds on a machine of `cores` threads."""
        value = self.idle * cores * wall + (self.active - self.idle) * cpu
        return Quantity(
            value=value, unit="J", method="modelled", low=value * (1 - self.uncertainty),
            high=value * (1 + self.uncertainty), reason=f"watts per core of {self.name}",
        )


class Rapl:
    """Joules since construction, summed over the domains; `read` must be called before a counter wraps twice."""

    def __init__(self, domains: list[Path]) -> None:
        self._domains = domains
        self._last = [self._value(d) for d in domains]
        self._spans = [int((d / "max_energy_range_uj").read_text()) for d in domains]
        self._total = 0.0
        self._lock = threading.Lock()

    def read(self) -> float:
        with self._lock:
            now = [self._value(d) for d in self._domains]
            for new, old, span in zip(now, self._last, self._spans, strict=True):
                self._total += ((new - old) if new >= old else (new - old + span)) * 1e-6
            self._last = now
            return self._total

    @staticmethod
    def _value(domain: Path) -> int:
        return int((domain / "energy_uj").read_text())


class EnergyMeter:
    """A window: `with EnergyMeter(machine) as meter: ...`, then `meter.energy` in J.

    Measured when every part is; with an accelerator measured and a processor modelled, the sum is called modelled.
    """

    def __init__(
        self, machine: Machine, *, clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] | None = None,
    ) -> None:
        self.energy = Quantity.missing("J", "the window is still open")
        self.seconds = self.cpu_seconds = 0.0
        self._machine, self._clock, self._cpu_clock = machine, clock, cpu_clock or cpu_seconds
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        domains = rapl_domains()
        self._rapl = Rapl(domains) if domains else None
        self._gpu = _gpu_joules() if self._machine.gpus else None
        self._poller: threading.Thread | None = None
        if self._rapl:
            self._poller = threading.Thread(target=self._poll, daemon=True)
            self._poller.start()
        self._wall0, self._cpu0 = self._clock(), self._cpu_clock()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._closed.set()
        self.energy = self.so_far()

    def so_far(self) -> Quantity:
        """J since the window opened."""
        self.seconds = self._clock() - self._wall0
        self.cpu_seconds = self._cpu_clock() - self._cpu0
        if self._rapl:
            processor = Quantity(value=self._rapl.read(), unit="J", method="measured", reason="RAPL")
        else:
            model = PowerModel.of(self._machine)
            processor = model.joules(wall=self.seconds, cpu=self.cpu_seconds, cores=self._machine.cores)
        return self._with_gpu(processor)

    def _with_gpu(self, processor: Quantity) -> Quantity:
        if not self._machine.gpus:
            return processor
        after = _gpu_joules()
        if self._gpu is None or after is None:
            return Quantity.missing("J", "the accelerator's energy cannot be read; pip install 'fivefold[nvidia]'")
        joules = after - self._gpu

        def plus(x: float | None) -> float | None:
            return None if x is None else x + joules

        return replace(processor, value=plus(processor.value), low=plus(processor.low), high=plus(processor.high),
                       reason=f"{processor.reason}; accelerator measured by NVML")

    def _poll(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            assert self._rapl is not None
            self._rapl.read()


def intensity(country: str = "world") -> tuple[float, float]:
    """(grams CO2e per kWh, PUE) of the country: an ISO alpha-3 code or "world". Raises UserError."""
    book, own = shipped("grid"), overrides("grid")
    check_keys("grid", own, book)
    check_keys("grid", own.get("intensity", {}), {**book["intensity"], **own.get("intensity", {})})
    table = {**book["intensity"], **own.get("intensity", {})}
    key = country if country in table else country.upper()
    if key not in table:
        names = {k.lower(): k for k in table}
        near = names.get(nearest(country, names) or "")
        raise UserError(
            f"the grid book has no country {country!r}{f', did you mean {near!r}' if near else ''}; give an ISO"
            " alpha-3 code or \"world\", or add it to grid.toml in your settings"
        )
    return number("grid", key, table[key]), number("grid", "pue", own.get("pue", book["pue"]), least=1.0)


def carbon(joules_per_token: Quantity, country: str = "world") -> Quantity:
    """J/token -> grams of CO2e per million tokens, in the country's average grid."""
    grams, pue = intensity(country)
    out = joules_per_token.scaled(1e6 / JOULES_PER_KWH * pue * grams, "gCO2e/Mtoken", "modelled")
    note = f"{country}: {grams:g} g/kWh, PUE {pue:g}"
    return out if out.value is None else replace(out, reason=note)


@cache
def _devices() -> tuple[Any, ...]:
    library = nvml()
    if library is None:
        return ()
    return tuple(library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount()))


def _gpu_joules() -> float | None:
    """NVML's energy counters of all devices, J; None where there is none."""
    library, devices = nvml(), _devices()
    if library is None or not devices:
        return None
    try:
        return sum(library.nvmlDeviceGetTotalEnergyConsumption(d) for d in devices) / 1e3
    except library.NVMLError:
        return None
