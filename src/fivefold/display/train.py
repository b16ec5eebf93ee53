"""A fine-tuning run in a terminal: what was forecast and chosen, the run as it goes, what it left."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fivefold.display.static import LEGEND, console, number, table
from fivefold.metrics import show
from fivefold.study.forecast import Forecast
from fivefold.study.request import Finished, Planned
from fivefold.study.watch import Progress
from fivefold.training.memory import Needs

WIDTH = 24
SMOOTH = 0.1
LINES = 10
"""Without a terminal, so many lines over the whole run."""


class LiveTraining:
    """Hears a run's events; use as a context manager."""

    def __init__(self, out: Console | None = None) -> None:
        self.out = out or console()
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
                forecasts(event, self.out)
                if self.out.is_terminal:
                    self._live = Live(Text("loading the model"), console=self.out, refresh_per_second=4, transient=True)
                    self._live.__enter__()
            case Progress():
                self._loss = event.loss if math.isnan(self._loss) else (1 - SMOOTH) * self._loss + SMOOTH * event.loss
                self._score = self._score if event.score is None else event.score
                self._show(event)
            case str():
                self._stop()
                _say(self.out, Text(event, style="dim"))

    def _show(self, event: Progress) -> None:
        learned, spent = self.lines(event)
        part = event.step * LINES // event.steps
        if self._live is not None:
            self._live.update(Text(f"{learned}\n{spent}"))
        elif part != self._said or event.score is not None:
            self._said = part
            _say(self.out, f"{learned}  {spent}")

    def lines(self, event: Progress) -> tuple[str, str]:
        """How far it is and what it learned; what it took so far."""
        filled = round(event.step / event.steps * WIDTH)
        held = "" if math.isnan(self._score) else f"  held-out {self._score:.4f}"
        joules = "- J" if event.joules is None else show(event.joules, "J")
        usd = "$-" if event.usd is None else show(event.usd, "USD")
        return (
            f"{'━' * filled}{'╌' * (WIDTH - filled)} {event.step}/{event.steps}  loss {self._loss:.4f}{held}",
            f"{event.tokens_per_second:,.0f} tokens/s  {show(event.memory, 'byte')}  {joules}  {usd}"
            f"  {_time(event.seconds)}, {_time(event.left)} left",
        )

    def _stop(self) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None


def _say(out: Console, text: str | Text) -> None:
    out.print(text if isinstance(text, Text) else Text(text), soft_wrap=True)


def forecasts(planned: Planned, out: Console) -> None:
    """The ways that were considered: those that fit, and why the others do not."""
    _say(out, f"{planned.rows} examples ({planned.tokens:,} tokens), {planned.held_out} more held out, judged on"
              f" {planned.judged}")
    grid = table("way", "trains", "memory", "time", "energy", "money", "", right=("trains", "memory", "time"))
    for one in (f for f in planned.forecasts if not f.why_not):
        style = "bold" if one is planned.chosen else ""
        grid.add_row(*(Text(cell, style=style) for cell in _cells(one, one is planned.chosen)))
    out.print(grid)
    for one in (f for f in planned.forecasts if f.why_not):
        _say(out, Text(f"not {one.recipe}: {one.why_not}", style="dim"))
    if planned.chosen.needs is not None:
        _say(out, Text(f"memory of {planned.chosen.recipe}: {parts(planned.chosen.needs)}", style="dim"))
    _say(out, Text("~ modelled: memory by formula, time by the machine's rate, judging included", style="dim"))
    if planned.resumed:
        _say(out, f"going on after step {planned.resumed}")


def parts(needs: Needs) -> str:
    """The rows of the memory formula, and what is the larger of them and of loading."""
    named = {"process": needs.process, "weights": needs.weights + needs.beside,
             "gradients": needs.gradients + needs.waiting, "optimiser": needs.state, "activations": needs.activations,
             "head": needs.head, "slack": needs.slack}
    shown = " + ".join(f"{name} {show(size, 'byte')}" for name, size in named.items() if size)
    return shown if needs.loading < needs.peak else f"{shown}; reading the weights takes {show(needs.loading, 'byte')}"


def _cells(one: Forecast, chosen: bool) -> list[str]:
    assert one.needs is not None
    return [str(one.recipe), f"{one.trained:,}", show(one.needs.peak, "byte"), _time(one.seconds),
            show(one.joules, "J"), show(one.usd, "USD"), "chosen" if chosen else ""]


def _time(seconds: float) -> str:
    if seconds < 1:
        return "< 1 s" if seconds > 0 else "0 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def trained(done: Finished, out: Console | None = None) -> None:
    """What a run left: costs, quality against the parent, where the model is and what to do with it."""
    out = out or console()
    _say(out, f"\n{done.recipe}: {done.steps} steps, {done.numbers:,} numbers trained,"
              f" held-out loss {done.before:.4f} -> {done.after:.4f}")
    if done.stopped:
        _say(out, f"stopped early: {done.stopped}")
    _say(out, f"judged on {done.judged.items}, where it is served:")
    grid = table("", "parent", "this model")
    for name, quantity in done.judged.card.items():
        grid.add_row(name, number(done.judged.parent.get(name)), number(quantity))
    out.print(grid)
    if done.judged.verdict is not None:
        _say(out, f"against the parent: {done.judged.verdict}")
    took = table("to make", "")
    for name, quantity in done.cost.quantities().items():
        if name in ("seconds", "energy", "money", "memory"):
            took.add_row(name, number(quantity))
    peak = done.cost.memory.value
    if peak:
        took.add_row("memory forecast", f"{show(done.predicted_peak, 'byte')} ({done.predicted_peak / peak - 1:+.0%})")
    took.add_row("difference", f"{show(done.delta_bytes, 'byte')} to send to whoever has the parent")
    out.print(took)
    _say(out, Text(LEGEND, style="dim"))
    _say(out, f"model      {done.folder / 'model'}")
    _say(out, f"serve it   fivefold serve {done.folder / 'model'}")
    _say(out, f"ship it    fivefold ship {done.folder} --to my-model")
    _say(out, f"cheaper    fivefold optimize {done.folder / 'model'} --out {done.folder / 'search'}")
