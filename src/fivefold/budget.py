"""Budget: hard limits on the result. Allowance: limits on the search itself. Units are the user's own.

    Budget.parse("memory<=260MB, latency<=20ms, agreement>=0.85, size<=0.25x")
    Allowance.parse("8min, 5Wh, 4GB")

`0.25x` is relative to the parent. MB is 10^6 bytes, MiB 2^20. Pure arithmetic; knows metric names only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fivefold.errors import BudgetError
from fivefold.metrics import METRICS
from fivefold.space import nearest

_SIZES = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2.0**10, "MiB": 2.0**20,
          "GiB": 2.0**30}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}
_JOULES = {"mJ": 1e-3, "J": 1.0, "kJ": 1e3, "MJ": 1e6, "Wh": 3600.0, "kWh": 3.6e6}
_USD = {"$": 1.0, "USD": 1.0, "cent": 0.01}
_COUNTS = {"FLOP": 1.0, "MFLOP": 1e6, "GFLOP": 1e9, "TFLOP": 1e12}
_KINDS: dict[str, Mapping[str, float]] = {
    "byte": _SIZES, "byte/token": _SIZES, "s": _TIMES, "s/token": _TIMES, "J/token": _JOULES,
    "USD/Mtoken": _USD, "USD/parameter": _USD, "FLOP/token": _COUNTS, "fraction": {"%": 0.01},
    "token/s": {"tok/s": 1.0, "token/s": 1.0, "tokens/s": 1.0}, "gCO2e/Mtoken": {"g": 1.0, "kg": 1e3},
    "nat/token": {"nat": 1.0}, "1": {},
}
_LIMIT = re.compile(r"\s*([A-Za-z_][\w]*)\s*(<=|>=|<|>|=|==)\s*(\$?)\s*([0-9.eE+-]+)\s*([A-Za-z$%/]*)\s*")
_AMOUNT = re.compile(r"\s*(\$?)\s*([0-9.eE+-]+)\s*([A-Za-z$]*)\s*")


@dataclass(frozen=True, slots=True)
class Limit:
    """`value` is in the metric's base unit, or a multiple of the parent's value when `relative`."""

    metric: str
    upper: bool
    value: float
    relative: bool = False
    text: str = ""

    def bound(self, parent: Mapping[str, float | None]) -> float | None:
        if not self.relative:
            return self.value
        base = parent.get(self.metric)
        return None if base is None else base * self.value

    def excess(self, values: Mapping[str, float | None], parent: Mapping[str, float | None]) -> float | None:
        """By what fraction the limit is missed: <= 0 is met, None when the metric or the parent's is unknown."""
        value, bound = values.get(self.metric), self.bound(parent)
        if value is None or bound is None:
            return None
        gap = value - bound if self.upper else bound - value
        return gap / max(abs(bound), 1e-12)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Budget:
    limits: tuple[Limit, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Raises BudgetError with one sentence."""
        if len(text) > 2000:
            raise BudgetError("the budget is longer than 2000 characters; shorten it")
        return cls(tuple(_limit(part) for part in text.split(",") if part.strip()))

    def __iter__(self) -> Iterator[Limit]:
        return iter(self.limits)

    def __str__(self) -> str:
        return ", ".join(map(str, self.limits))

    def excess(self, values: Mapping[str, float | None], parent: Mapping[str, float | None]) -> float:
        """The worst relative excess over all limits; <= 0 means the budget is met; inf when one is unknown."""
        gaps = [limit.excess(values, parent) for limit in self]
        return max((math.inf if g is None else g for g in gaps), default=0.0)

    def met(self, values: Mapping[str, float | None], parent: Mapping[str, float | None]) -> bool:
        return self.excess(values, parent) <= 0


def _limit(part: str) -> Limit:
    match = _LIMIT.fullmatch(part)
    if not match:
        raise BudgetError(f"cannot read the limit {part.strip()[:60]!r}; write it like memory<=260MB or agreement>=0.9")
    name, sign, dollar, number, unit = match.groups()
    metric = METRICS.get(name)
    if metric is None:
        hint = nearest(name, METRICS)
        near = f"did you mean {hint}?" if hint else f"metrics: {', '.join(METRICS)}"
        raise BudgetError(f"there is no metric {name!r}; {near}")
    upper = metric.better == "lower"
    if sign not in (("<=", "<") if upper else (">=", ">")):
        want = "<=" if upper else ">="
        raise BudgetError(f"{name} is better {metric.better}, so its limit is written {name}{want}...")
    value = _number(number, part)
    text = f"{name}{'<=' if upper else '>='}{dollar}{number}{unit}"
    if unit == "x":
        return Limit(name, upper, value, relative=True, text=text)
    return Limit(name, upper, value * _factor(metric.unit, dollar or unit, part), text=text)


def _number(text: str, part: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise BudgetError(f"{text!r} in {part.strip()[:60]!r} is not a number of at least 0; correct it")
    return value


def _factor(base: str, unit: str, part: str) -> float:
    units = _KINDS[base]
    unit = unit.removesuffix("/token").removesuffix("/tok") if unit not in units else unit
    if unit in ("", base):
        return 1.0
    if unit not in units:
        known = ", ".join([*units, "x (times the parent)"])
        raise BudgetError(f"the unit {unit!r} in {part.strip()[:60]!r} is unknown here; use one of: {known}")
    return units[unit]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What the search may spend. None is unlimited. seconds, joules, USD, bytes of disk."""

    time: float | None = None
    energy: float | None = None
    money: float | None = None
    disk: float | None = None

    @classmethod
    def parse(cls, text: str) -> Allowance:
        """`8min`, `1h, 50Wh, $2, 4GB`: the unit says which limit is meant. Raises BudgetError."""
        found: dict[str, float] = {}
        tables = {"time": _TIMES, "energy": _JOULES, "money": _USD, "disk": _SIZES}
        for part in filter(str.strip, text.split(",")):
            match = _AMOUNT.fullmatch(part)
            unit = match and (match[1] or match[3])
            kind = next((k for k, units in tables.items() if unit in units), None)
            if not match or kind is None or not unit:
                raise BudgetError(
                    f"cannot read the allowance {part.strip()[:60]!r}; write it like 8min, 50Wh, $2 or 4GB"
                )
            if kind in found:
                raise BudgetError(f"the allowance limits {kind} twice; keep one")
            found[kind] = _number(match[2], part) * tables[kind][unit]
        return cls(**found)


def size(text: str) -> int:
    """`1GB` -> bytes. Raises BudgetError."""
    match = _AMOUNT.fullmatch(text)
    if not match or match[1] or match[3] not in _SIZES:
        raise BudgetError(f"cannot read the size {text.strip()[:60]!r}; write it like 900MB or 1.5GiB")
    return int(_number(match[2], text) * _SIZES[match[3]])


def objectives(text: str) -> tuple[str, ...]:
    """`latency,energy,size` -> metric names, each once. Higher-is-better metrics are maximised. Raises BudgetError."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in METRICS:
            hint = nearest(name, METRICS)
            near = f"did you mean {hint}?" if hint else f"metrics: {', '.join(METRICS)}"
            raise BudgetError(f"there is no metric {name!r} to minimise; {near}")
    if not names:
        raise BudgetError("no objective was given; write it like --minimize latency,energy,size")
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBudget:
    """What a training run may take: bytes of memory at its peak, seconds, joules, USD. None is unlimited."""

    memory: float | None = None
    time: float | None = None
    energy: float | None = None
    money: float | None = None

    @classmethod
    def parse(cls, text: str) -> TrainingBudget:
        """`memory<=2GB, time<=20min, energy<=5Wh, money<=$0.1`. Raises BudgetError."""
        tables = {"memory": _SIZES, "time": _TIMES, "energy": _JOULES, "money": _USD}
        found: dict[str, float] = {}
        if len(text) > 2000:
            raise BudgetError("the training budget is longer than 2000 characters; shorten it")
        for part in filter(str.strip, text.split(",")):
            match = _LIMIT.fullmatch(part)
            unit = match and match[3] + match[5]
            if not match or match[2] not in ("<=", "<") or match[1] not in tables:
                near = nearest(match[1], tables) if match else None
                hint = f"did you mean {near}?" if near and match and match[1] not in tables else (
                    "write it like memory<=2GB, time<=20min, energy<=5Wh or money<=$0.1")
                raise BudgetError(f"cannot read the training limit {part.strip()[:60]!r}; {hint}")
            if match[1] in found:
                raise BudgetError(f"the training budget limits {match[1]} twice; keep one")
            if unit not in tables[match[1]]:
                known = ", ".join(tables[match[1]])
                raise BudgetError(f"{part.strip()[:60]!r} has no unit of {match[1]}; use one of: {known}")
            found[match[1]] = _number(match[4], part) * tables[match[1]][unit]
        return cls(**found)
