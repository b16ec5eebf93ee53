"""What every benchmark shares: where its fragment goes, the line of facts under it, and a Markdown table.

A fragment is docs/benchmarks/<name>.md: what was compared, the table, the command, the machine, the date and the
versions. `publish` writes and prints it and joins all fragments into docs/benchmarks.md again (`assemble`).
"""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from assemble import FRAGMENTS, assemble

from fivefold.errors import FivefoldError
from fivefold.files import write_text
from fivefold.machine import Machine
from fivefold.quantity import Quantity
from fivefold.recipe import Stage, catalogue


def publish(name: str, title: str, body: str, *, packages: Sequence[str] = (), keep: bool = True) -> str:
    """Print the fragment and, unless `keep` is False (a smoke run), write it. The versions of `packages` are named."""
    text = f"## {title}\n\n{body.strip()}\n\n`{command()}`\n\n{facts(packages)}\n"
    print(f"\n{text}")
    if keep:
        FRAGMENTS.mkdir(parents=True, exist_ok=True)
        (FRAGMENTS / f"{name}.md").write_text(text, encoding="utf-8")
        assemble()
    return text


def by_isa(name: str, title: str) -> tuple[str, str]:
    """Name and title of a kernel's fragment: processors with AVX-512, with AVX2 and with neither have one each."""
    isa = Machine.load().isa
    if "avx512" in isa:
        return name, title
    return (f"{name}_avx2", f"{title}, AVX2") if "avx2" in isa else (f"{name}_plain", f"{title}, no wide vectors")


def attempt(name: str, folder: Path, work: Callable[[], dict[str, Any]]) -> None:
    """Write what `work` returns to `folder/name.json`, or the sentence with which it was refused."""
    try:
        found = work()
    except FivefoldError as error:
        found = {"name": name, "why": str(error)}
    write_text(folder / f"{name}.json", json.dumps(found))


def of_inference() -> list[str]:
    """The techniques of inference, in the catalogue's order."""
    return [n for n, t in catalogue().items() if t.__module__.split(".")[-2].upper() == Stage.INFERENCE.name]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    ruler = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ruler, *rows))


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def interval(quantity: Quantity | None, digits: int = 2, factor: float = 1.0) -> str:
    """`1.23 [1.20, 1.27]`; no interval for a single sample, a dash for what could not be obtained."""
    if quantity is None or quantity.value is None:
        return "-"
    q = quantity.scaled(factor, quantity.unit)
    known = q.low is not None and q.high is not None and q.n > 1
    ends = f" [{number(q.low, digits)}, {number(q.high, digits)}]" if known else ""
    return number(q.value, digits) + ends


def facts(packages: Sequence[str] = ()) -> str:
    """One line: processor, memory, measured rates, date, versions. No host name, no path."""
    machine = Machine.load()
    bandwidth = machine.rates[f"bandwidth.{machine.cores}"].value
    known = [f"{name} {version(name)}" for name in ("fivefold", *packages)]
    parts = [
        f"{machine.cpu}, {machine.cores} cores ({', '.join(machine.isa)})", f"{machine.ram / 1e9:.0f} GB", machine.os,
        f"reads {number(bandwidth and bandwidth / 1e9, 1)} GB/s", datetime.date.today().isoformat(),
        f"Python {platform.python_version()}", *known,
    ]
    return "; ".join(parts) + "."


def command() -> str:
    """What was typed; of absolute paths only the last part."""
    given = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *given])
