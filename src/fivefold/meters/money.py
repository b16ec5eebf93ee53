"""Money: what a token, and the making of a model, costs in dollars.

    USD per token = seconds x machine hour / 3600  +  joules / 3.6e6 x electricity  +  answer bytes x egress

A machine hour is its cores and accelerators at the prices of prices.toml (by default a machine you own, without its
electricity; on a rented one set electricity to 0). The machine is charged while it works, not while it waits: at
low load the true cost per token is higher by one over the share of time in use. Everything here is modelled.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from fivefold.machine import Machine
from fivefold.meters._books import check_keys, number, overrides, shipped
from fivefold.meters.energy import JOULES_PER_KWH
from fivefold.quantity import Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """The price book, USD. `date` is the day it was written."""

    electricity_usd_per_kwh: float
    core_hour_usd: float
    gpu_hour_usd: float
    egress_usd_per_gb: float
    date: str

    @classmethod
    def load(cls, file: Path | None = None) -> Prices:
        """The shipped book with the user's entries over it. Raises UserError for an unknown key or a bad value."""
        book, own = shipped("prices"), overrides("prices", file)
        check_keys("prices", own, book)
        merged = {**book, **own}
        date = str(merged.pop("date"))
        return cls(date=date, **{k: number("prices", k, v) for k, v in merged.items()})

    def machine_hour(self, machine: Machine) -> float:
        return machine.cores * self.core_hour_usd + len(machine.gpus) * self.gpu_hour_usd

    def to_json(self) -> dict[str, float | str]:
        return asdict(self)


def cost(
    prices: Prices, machine: Machine, *, seconds: Quantity, joules: Quantity, egress_bytes: float = 0.0
) -> Quantity:
    """USD of so many seconds of the machine, joules, and bytes sent out. Intervals add."""
    return _sum(
        "USD",
        seconds.scaled(prices.machine_hour(machine) / 3600, "USD"),
        joules.scaled(prices.electricity_usd_per_kwh / JOULES_PER_KWH, "USD"),
        Quantity(value=egress_bytes * prices.egress_usd_per_gb / 1e9, unit="USD", method="modelled"),
    )


def per_million(
    prices: Prices, machine: Machine, *, seconds_per_token: Quantity, joules_per_token: Quantity,
    answer_bytes_per_token: float = 0.0,
) -> Quantity:
    """USD per million output tokens."""
    one = cost(prices, machine, seconds=seconds_per_token, joules=joules_per_token,
               egress_bytes=answer_bytes_per_token)
    return one.scaled(1e6, "USD/Mtoken")


def per_parameter(to_make: Quantity, parameters: int) -> Quantity:
    """USD spent to make a model, per parameter it has."""
    return to_make.scaled(1 / parameters, "USD/parameter")


def _sum(unit: str, *parts: Quantity) -> Quantity:
    for part in parts:
        if part.value is None:
            return Quantity.missing(unit, part.reason, "modelled")

    def total(side: str) -> float:
        ends = (getattr(p, side) for p in parts)
        return sum(float(p.value or 0.0) if end is None else end for p, end in zip(parts, ends, strict=True))

    return Quantity(value=total("value"), unit=unit, method="modelled", n=min(p.n for p in parts), low=total("low"),
                    high=total("high"))
