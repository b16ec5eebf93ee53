"""What every benchmark shares: where its fragment goes, the line of facts under it, and a Markdown table.

A fragment is docs/benchmarks/<name>.md: what was compared, the table, the command, the machine, the date and the
versions. `publish` writes and prints it and joins all fragments into docs/benchmarks.md again (`assemble`).
"""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from assemble import FRAGMENTS, assemble

from fivefold.machine import Machine
from fivefold.quantity import Quantity


def publish(name: str, title: str, body: str, *, packages: Sequence[str] = (), keep: bool = True) -> str:
    """Print the fragment and, unless `keep` is False (a smoke run), write it. The versions of `packages` are named."""
    text = f"## {title}\n\n{body.strip()}\n\n`{command()}`\n\n{facts(packages)}\n"
    print(f"\n{text}")
    if keep:
        FRAGMENTS.mkdir(parents=True, exist_ok=True)
        (FRAGMENTS / f"{name}.md").write_text(text, encoding="utf-8")
        assemble()
    return text


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
