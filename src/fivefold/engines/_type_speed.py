"""What one weight of each storage type costs in time, in llama.cpp on this machine: the table, and where it is kept.

A type's bytes do not tell its speed: some types have vector kernels over rearranged rows, others are unpacked bit by
bit, so a type of 5 bits can decode slower than one of 8. `_type_timing` measures it; here a table turns numbers of
weights into seconds, and is remembered per machine, engine version, thread count and widths in the user's cache:

    decode:  time per token    = L (layer + attended p w) + sum_t n_t s_t + sum_t m_t h_t
    prefill: time of P tokens  = P sum_t n'_t s'_t + sum_t m_t h_t

L layers, position p, attention of w = heads x head_dim, n_t weights of type t in the layers and m_t in the output
head; n' leaves out what the last layer needs for the last token only. `others` tells how quiet the machine was: above
ROUGH the table is no better than bytes. It does not help for other engines, or for batches.

Source: measured; the timing is `_type_timing`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from fivefold.engines._synthetic import Shape, block_sizes
from fivefold.files import atomic_file, locked
from fivefold.machine import Machine, quiet
from fivefold.model import Blueprint
from fivefold.paths import cache_dir

PROTOCOL = 1  # raise it when a number changes its meaning: remembered tables are then measured again
BASE = "q8_0"
ROUGH = 0.3
"""Share of the cores used by others above which a table is not to be trusted."""

Table = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TypeSpeeds:
    """Seconds: `decode[t]` and `head[t]` per weight and token, `prefill[t]` per weight and prompt token.

    `base` holds layer and attended (see the module); `scale[n]` the (decode, prefill) time
    with n threads over that with `threads`; `others` the share of the cores that others used meanwhile.
    """

    threads: int
    decode: Table
    head: Table
    prefill: Table
    base: Table
    scale: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    others: float = 0.0

    def token_seconds(
        self, *, layers: int, position: float, units: int, weights: Table, head: Table, threads: int | None = None
    ) -> float:
        """To decode one token: type -> weights in the layers and in the output head; `units` = heads x head_dim."""
        fixed = layers * (self.base["layer"] + self.base["attended"] * position * units)
        read = _total(self.decode, weights) + _total(self.head, head)
        return (fixed + read) * self._scaled(threads)[0]

    def prompt_seconds(
        self, *, layers: int, tail: float, prompt: int, weights: Table, head: Table, threads: int | None = None
    ) -> float:
        """To read a prompt and give its first token. `tail` is `Shape.tail`, `weights` are those of all layers."""
        read = prompt * (1 - tail / layers) * _total(self.prefill, weights)
        return (read + _total(self.head, head)) * self._scaled(threads)[1]

    def matrix_seconds(self, kind: str, weights: float, *, head: bool = False) -> float:
        """To decode one token's share of a matrix."""
        return weights * per_weight(self.head if head else self.decode, kind)

    @property
    def digest(self) -> str:
        """SHA-256 of the table: what a choice made from it depends on."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def _scaled(self, threads: int | None) -> tuple[float, float]:
        """Of the nearest count measured."""
        if threads is None or threads == self.threads or not self.scale:
            return 1.0, 1.0
        known = {**self.scale, self.threads: (1.0, 1.0)}
        return known[min(known, key=lambda n: (abs(n - threads), n))]

    def to_json(self) -> dict[str, Any]:
        out = asdict(self)
        return {**out, "scale": {str(n): list(pair) for n, pair in self.scale.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TypeSpeeds:
        scale = {int(n): (float(a), float(b)) for n, (a, b) in data["scale"].items()}
        made = cls(**{**{f.name: data[f.name] for f in fields(cls)}, "scale": scale})
        if not all(x >= 0 for x in chain.from_iterable(t.values() for t in (made.decode, made.head, made.prefill))):
            raise ValueError("negative time")
        return made


def known(blueprint: Blueprint, machine_id: str | None = None) -> TypeSpeeds | None:
    """The remembered table of these widths on this machine (or the named one), or None. Never measures."""
    file = _file(blueprint, machine_id or _here().id)
    try:
        return _read(file, file.stat().st_mtime_ns)
    except OSError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        file.unlink(missing_ok=True)
        return None


def measured(blueprint: Blueprint, refresh: bool = False) -> TypeSpeeds:
    """The remembered table, measured now if there is none. Raises ModelError when the engine cannot run the widths."""
    file = _file(blueprint, _here().id)
    from fivefold.engines._type_timing import measure

    with locked(file.parent / "lock"):
        found = None if refresh else known(blueprint)
        if found is None:
            found = measure(Shape.of(blueprint))
            text = json.dumps(found.to_json(), indent=1)
            atomic_file(file, lambda out: out.write(text.encode()))
    return found


def settle(blueprint: Blueprint) -> TypeSpeeds | None:
    """The remembered table. None yet, or a rough one: measured now if the machine is quiet, else left as it is."""
    found = known(blueprint)
    if found is not None and found.others <= ROUGH:
        return found
    return measured(blueprint, refresh=True) if quiet(ROUGH) else found


@lru_cache(maxsize=64)
def _read(file: Path, stamp: int) -> TypeSpeeds:
    """`stamp` changes when the file does."""
    return TypeSpeeds.from_json(json.loads(file.read_text(encoding="utf-8")))


@lru_cache(maxsize=1)
def _here() -> Machine:
    return Machine.probe()


@lru_cache(maxsize=64)
def _name(blueprint: Blueprint, machine_id: str) -> str:
    from fivefold.engines._llama_abi import PACKAGE

    widths = json.dumps(asdict(Shape.of(blueprint)), sort_keys=True)
    engine = f"{PACKAGE}-{version(PACKAGE)}"
    return (f"{machine_id[:16]}-{PROTOCOL}-{engine}-{default_threads()}-"
            f"{hashlib.sha256(widths.encode()).hexdigest()[:16]}.json")


def _file(blueprint: Blueprint, machine_id: str) -> Path:
    return cache_dir() / "type_speed" / _name(blueprint, machine_id)


def default_threads() -> int:
    """Of the engine, where a plan says nothing."""
    from fivefold.engines.llama_cpp import physical_cores

    return physical_cores()


def _total(table: Table, weights: Table) -> float:
    return sum(count * per_weight(table, kind) for kind, count in weights.items() if count)


def per_weight(table: Table, kind: str) -> float:
    """Seconds per weight; of a type that was not measured between its neighbours in bits, beyond them by bits."""
    if kind in table:
        return table[kind]
    wanted = _bits(kind)
    below = max((t for t in table if _bits(t) <= wanted), key=_bits, default=None)
    above = min((t for t in table if _bits(t) >= wanted), key=_bits, default=None)
    if below is None or above is None:
        edge = below or above
        assert edge is not None, "a table holds at least one type"
        return table[edge] * wanted / _bits(edge)
    if _bits(below) == _bits(above):
        return table[below]
    share = (wanted - _bits(below)) / (_bits(above) - _bits(below))
    return table[below] + share * (table[above] - table[below])


def _bits(kind: str) -> float:
    weights, size = block_sizes(kind)
    return 8 * size / weights
