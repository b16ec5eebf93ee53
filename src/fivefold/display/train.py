"""A fine-tuning run in a terminal: what was forecast and chosen, the run as it goes, what it left."""

from __future__ import annotations

import math
from typing import Any

from rich.live import Live
from rich.text import Text

from fivefold.display.static import LEGEND, console, number, table
from fivefold.metrics import show
from fivefold.study.forecast import Forecast
from fivefold.study.train import Finished, Planned, Progress

WIDTH = 24
SMOOTH = 0.1
LINES = 10
"""Without a terminal, so many lines over the whole run."""


class LiveTraining:
    """Hears a run's events; use as a context manager."""

    def __init__(self) -> None:
        self.out = console()
        self._live: Live | None = None
        self._loss = self._score = math.nan
        self._said = -1

    def __enter__(self) -> LiveTraining:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def __call__(self, event: Progress | Planned | str) -> None:
        match event:
            case Planned():
                forecasts(event)
                if self.out.is_terminal:
                    self._live = Live(Text("loading the model"), console=self.out, refresh_per_second=4, transient=True)
                    self._live.__enter__()
            case Progress():
                self._loss = event.loss if math.isnan(self._loss) else (1 - SMOOTH) * self._loss + SMOOTH * event.loss
                self._score = self._score if event.score is None else event.score
                self._show(event)
            case str():
                self._stop()
                self.out.print(Text(event, style="dim"))

    def _show(self, event: Progress) -> None:
        line = self.line(event)
        if self._live is not None:
            self._live.update(line)
        elif event.step * LINES // event.steps != self._said or event.score is not None:
            self._said = event.step * LINES // event.steps
            self.out.print(line, soft_wrap=True)

    def line(self, event: Progress) -> Text:
        filled = round(event.step / event.steps * WIDTH)
        left = event.seconds / event.step * (event.steps - event.step)
        held = "" if math.isnan(self._score) else f"  held-out {self._score:.4f}"
        joules = "-" if event.joules is None else show(event.joules, "J")
        usd = "-" if event.usd is None else show(event.usd, "USD")
        return Text(
            f"{'━' * filled}{'╌' * (WIDTH - filled)} {event.step}/{event.steps}  loss {self._loss:.4f}{held}"
            f"  {event.tokens_per_second:,.0f} tokens/s  {show(event.memory, 'byte')}  {joules}  {usd}"
            f"  {event.seconds:.0f} s, {left:.0f} s left"
        )

    def _stop(self) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None


def forecasts(planned: Planned) -> None:
    """The ways that were considered; those that do not fit with their reason."""
    out = console()
    out.print(f"{planned.rows} examples ({planned.tokens:,} tokens), {planned.held_out} more held out")
    grid = table("way", "trains", "memory", "time", "energy", "money", "", right=("trains", "memory", "time"))
    for one in planned.forecasts:
        style = "bold" if one is planned.chosen else "dim" if one.why_not else ""
        grid.add_row(*(Text(cell, style=style) for cell in _cells(one, one is planned.chosen)))
    out.print(grid)
    out.print(Text("~ modelled: memory by formula, time by the machine's rate", style="dim"))
    if planned.resumed:
        out.print("going on with the run that was stopped")


def _cells(one: Forecast, chosen: bool) -> list[str]:
    if one.needs is None:
        return [str(one.recipe), "", "", "", "", "", one.why_not]
    note = "chosen" if chosen else one.why_not
    return [str(one.recipe), f"{one.trained:,}", show(one.needs.peak, "byte"), _time(one.seconds),
            show(one.joules, "J"), show(one.usd, "USD"), note]


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def trained(done: Finished) -> None:
    """What a run left: costs, quality against the parent, where the model is and what to do with it."""
    out = console()
    out.print(f"\n{done.recipe}: {done.steps} steps, {done.numbers:,} numbers trained,"
              f" held-out loss {done.before:.4f} -> {done.after:.4f}")
    if done.stopped:
        out.print(f"stopped early: {done.stopped}")
    grid = table("", "parent", "this model")
    for name, quantity in done.judged.card.items():
        grid.add_row(name, number(done.judged.parent.get(name)), number(quantity))
    out.print(grid)
    if done.judged.verdict is not None:
        out.print(f"against the parent, on {done.judged.items}: {done.judged.verdict}")
    took = table("to make", "")
    for name, quantity in done.cost.quantities().items():
        if name in ("seconds", "energy", "money", "memory"):
            took.add_row(name, number(quantity))
    peak = done.cost.memory.value
    if peak:
        took.add_row("memory forecast", f"{show(done.predicted_peak, 'byte')} ({done.predicted_peak / peak - 1:+.0%})")
    took.add_row("difference", f"{show(done.delta_bytes, 'byte')} to send to whoever has the parent")
    out.print(took)
    out.print(Text(LEGEND, style="dim"))
    out.print(f"model      {done.folder / 'model'}")
    out.print(f"serve it   fivefold serve {done.folder / 'model'}")
    out.print(f"cheaper    fivefold optimize {done.folder / 'model'} --out {done.folder / 'search'}")
