"""The machine, one measurement, a comparison, a shipped folder and the catalogue, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fivefold.metrics import METRICS, RESOURCES, scale, show
from fivefold.quantity import Measurement, Quantity

if TYPE_CHECKING:
    from fivefold.machine import Machine

MARKS = {"measured": "●", "counted": "=", "modelled": "~"}
LEGEND = "● measured   = counted   ~ modelled   [low, high] 95 % interval"


def console() -> Console:
    return Console(highlight=False)


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    made = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def number(quantity: Quantity | None, *, interval: bool = True) -> Text:
    """`● 8.3 ms [8.1, 8.6]`; what is missing shows its reason."""
    if quantity is None or quantity.value is None:
        return Text(f"- {quantity.reason}" if quantity and quantity.reason else "-", style="dim")
    text = Text(f"{MARKS[quantity.method]} {show(quantity.value, quantity.unit)}")
    if interval and quantity.low is not None and quantity.high is not None and quantity.high > quantity.low:
        low, high = (_bare(x, quantity.value, quantity.unit) for x in (quantity.low, quantity.high))
        text.append(f" [{low}, {high}]", style="dim")
    return text


def _bare(place: float, value: float, unit: str) -> str:
    """The end of an interval in the unit that `value` is shown in, without the unit."""
    if unit.startswith("USD"):
        return show(place, "USD")
    place /= scale(value, unit)[0]
    if unit == "fraction":
        return f"{place:.1f}"
    return f"{place:,.0f}" if abs(place) >= 1000 else f"{place:.3g}"


def machine(profile: Machine) -> None:
    out = console()
    grid = table("", "", "", "")
    grid.show_header = False
    topic = ""
    for row in profile.doctor():
        value = number(row.quantity) if row.quantity else Text(row.text)
        note = Text(row.text if row.quantity else "", style="dim")
        grid.add_row(Text(row.topic if row.topic != topic else "", style="bold"), row.name, value, note)
        if row.fix:
            grid.add_row("", "", Text(f"→ {row.fix}", style="yellow"), "")
        topic = row.topic
    out.print(grid)
    out.print(Text(LEGEND, style="dim"))


def measurement(measured: Measurement) -> None:
    out = console()
    grid = table("", "metric", "value", "what")
    for resource in (*RESOURCES, "quality"):
        names = [n for n, m in METRICS.items() if m.resource == resource and n in measured]
        for i, name in enumerate(names):
            label = Text(METRICS[name].label, style="dim")
            grid.add_row(Text(resource if i == 0 else "", style="bold"), name, number(measured[name]), label)
    out.print(grid)
    out.print(Text(LEGEND, style="dim"))
    if tasks := measured.context.get("tasks"):
        each = ", ".join(f"{name} {show(t['accuracy'], 'fraction')} of {t['items']}" for name, t in tasks.items())
        out.print(Text(f"accuracy by task: {each}", style="dim"))
    context = {k: v for k, v in measured.context.items() if isinstance(v, str | int | float)}
    out.print(Text(", ".join(f"{k} {v}" for k, v in context.items()), style="dim"))


def comparison(compared: Any) -> None:
    """A `study.compare.Comparison`."""
    out = console()
    style = {"ACCEPT": "bold green", "REGRESSION": "bold red"}.get(compared.decision.name, "bold yellow")
    out.print(Text(compared.decision.name, style=style), Text(compared.sentence))
    grid = table("metric", "A", "B", "B / A")
    for name, (a, b, ratio) in compared.rows.items():
        grid.add_row(name, number(a), number(b), number(ratio))
    out.print(grid)
    _groups(compared.groups, out)
    out.print(Text(LEGEND, style="dim"))
    for note in compared.notes:
        out.print(Text(note))


def _groups(groups: Any, out: Console) -> None:
    """A `tasks.subgroups.Groups`: a row per group, its partition named once."""
    columns = list(dict.fromkeys(name for row in groups.rows for name in row.values))
    grid = table("", "group", groups.members, *columns, right=(groups.members,))
    by = ""
    for row in groups.rows:
        cells = [number(row.values.get(name)) for name in columns]
        grid.add_row(Text(row.by if row.by != by else "", style="bold"), row.name, str(row.n), *cells)
        by = row.by
    out.print(grid)


def shipped(done: Any) -> None:
    """A `study.ship.Shipped`."""
    out = console()
    grid = table("metric", done.held_against, "shipped copy", "")
    for name, (before, after, verdict) in done.rows.items():
        grid.add_row(name, number(before), number(after), verdict)
    out.print(grid)
    out.print(f"shipped to {done.folder}: every file checked, measured again, card written")
    out.print(f"serve it:  fivefold serve {done.folder}")


def catalogue(entries: Sequence[Any]) -> None:
    out = console()
    if len(entries) == 1:
        _entry(out, entries[0])
        return
    grid = table("stage", "technique", "lowers", "may raise", "what")
    stage = ""
    for entry in entries:
        lowers = ", ".join(k if v == "direct" else f"({k})" for k, v in entry.lowers.items())
        raises = ", ".join(entry.may_raise)
        grid.add_row(Text(entry.stage if entry.stage != stage else "", style="bold"), entry.name, lowers, raises,
                     entry.summary)
        stage = entry.stage
    out.print(grid)
    out.print(Text("(in brackets: indirectly)   fivefold catalogue NAME shows one in full", style="dim"))


def _entry(out: Any, entry: Any) -> None:
    """One technique: its text as flowing paragraphs, what it declares, its fields."""
    from fivefold.verbs import default, legal

    out.print(Text(f"{entry.name}\n", style="bold"))
    for paragraph in entry.text.split("\n\n"):
        as_is = any(line.startswith("  ") for line in paragraph.splitlines())
        out.print(Text(f"{paragraph if as_is else ' '.join(paragraph.split())}\n"))
    for fact in entry.facts:
        out.print(Text(f"- {fact}"))
    if entry.fields:
        grid = table("field", "legal", "default", "what")
        for field in entry.fields:
            grid.add_row(field.name, legal(field), default(field), field.help)
        out.print("", grid, sep="\n")
