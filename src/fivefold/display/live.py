"""The live front: trials appear as points while a study runs, dominated ones grey out, failures show their sentence.

On a terminal it redraws in place; elsewhere (a log, a pipe) it prints one line per finished trial.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fivefold.display.static import console, table
from fivefold.metrics import METRICS, show
from fivefold.study import events as ev
from fivefold.study.trial import Outcome, Trial

WIDTH, HEIGHT, RECENT = 64, 12, 6
SHOWN = ("latency", "memory", "energy", "size", "agreement")
ALSO = ("accuracy",)
"""Shown where it was measured."""


class LiveStudy:
    """A watcher of study events (`study.events`) and a context manager for the screen."""

    def __init__(self, to: Console | None = None) -> None:
        self.out = to or console()
        self.trials: dict[int, Trial] = {}
        self.front: tuple[int, ...] = ()
        self.axes = ("latency", "agreement")
        self.allowance: float | None = None
        self.spent = 0.0
        self.now = ""
        self.began = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stop()

    def __call__(self, event: Any) -> None:
        match event:
            case ev.Prepared(objectives=objectives, allowance=allowance):
                first = next((o for o in objectives if METRICS[o].resource != "quality"), "latency")
                quality = next((o for o in objectives if METRICS[o].resource == "quality"), "agreement")
                self.axes, self.allowance = (first, quality), allowance
                from fivefold.display.study import honesty, plan

                honesty(event.machine, self.out)
                plan(event.plan, self.out)
            case ev.Started(folder=folder, resumed=resumed):
                if resumed:
                    self.out.print(f"going on in {folder}: {resumed} trials are on record")
                self._start()
            case ev.TrialStarted(number=number, recipe=recipe, rung=rung, expected=expected):
                about = f", about {expected:.0f} s" if math.isfinite(expected) and expected > 0 else ""
                self.now = f"{rung} {number}: {recipe}{about}"
            case ev.PhaseStarted(number=number, phase=phase):
                self.now = f"{phase} {number}: {self.now.partition(': ')[2]}"
            case ev.TrialFinished(trial=trial):
                self.trials[trial.number] = trial
                if self._live is None:
                    self.out.print(line(trial, self.front))
            case ev.Paired(trials=paired):
                for trial in paired:
                    self.trials[trial.number] = trial
                    self.out.print(in_turn(trial))
            case ev.FrontChanged(front=front):
                self.front = tuple(t.number for t in front)
            case ev.Spent(time=spent):
                self.spent = spent
            case ev.Ended(why=why):
                self._stop()
                self.out.print(Text(f"search ended: {why}", style="dim"))
        if self._live is not None:
            self._live.update(self.frame())

    def _start(self) -> None:
        if self.out.is_terminal:
            self._live = Live(self.frame(), console=self.out, refresh_per_second=2, transient=True)
            self._live.__enter__()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None

    def frame(self) -> Group:
        measured = [t for t in self.trials.values() if t.outcome is Outcome.MEASURED]
        recent = [t for t in self.trials.values() if t.outcome is not Outcome.PREDICTED][-RECENT:]
        return Group(
            self._head(), Text(""), scatter(measured, self.front, *self.axes), Text(""),
            _front_table([t for t in measured if t.number in self.front]), Text(""),
            *(line(t, self.front) for t in recent), Text(f"▶ {self.now}", style="cyan"),
        )

    def _head(self) -> Text:
        spent = f"{self.spent:.0f} s"
        if self.allowance:
            share = min(1.0, self.spent / self.allowance)
            filled = round(share * 30)
            spent = f"{'━' * filled}{'╌' * (30 - filled)} {self.spent:.0f} of {self.allowance:.0f} s"
        outcomes = [t.outcome for t in self.trials.values()]
        counts = f"{sum(o is Outcome.MEASURED for o in outcomes)} measured, " \
                 f"{sum(o is Outcome.SCREENED for o in outcomes)} screened, " \
                 f"{sum(o is Outcome.PREDICTED for o in outcomes)} dropped by prediction, " \
                 f"{sum(o.failed for o in outcomes)} failed"
        return Text(f"{spent}   {counts}", style="bold")


def line(trial: Trial, front: Sequence[int]) -> Text:
    """One finished trial: mark, recipe, numbers or its sentence."""
    if trial.outcome is Outcome.MEASURED:
        best = trial.number in front
        values = "  ".join(
            f"{n} {show(trial.value(n), METRICS[n].unit)}" for n in (*SHOWN, *ALSO) if trial.value(n) is not None
        )
        return Text.assemble((f"{'●' if best else '·'} {trial.recipe}  ", "green" if best else "dim"), (values, "dim"))
    if trial.outcome is Outcome.SCREENED:
        kl = trial.screen.value("kl")
        return Text(f"○ {trial.recipe}  screened" + (f", kl {kl:.3g}" if kl is not None else ""), style="dim")
    mark = "~" if trial.outcome is Outcome.PREDICTED else "×"
    style = "dim" if trial.outcome is Outcome.PREDICTED else "red"
    return Text(f"{mark} {trial.recipe}  {trial.outcome}: {trial.sentence}", style=style)


def in_turn(trial: Trial) -> Text:
    """What a trial came to when measured in turn with the parent."""
    known = {n: trial.paired.value(n) for n in ("latency", "ttft", "energy") if trial.paired.value(n) is not None}
    values = "  ".join(f"{n} {v:.2g}x" for n, v in known.items())
    said = values or f"{trial.paired.context['outcome']}: {trial.paired.context['sentence']}"
    return Text(f"⇄ {trial.recipe}  in turn with the parent  {said}", style="dim" if known else "red")


def _front_table(front: Sequence[Trial]) -> Table:
    grid = table("front", *SHOWN, right=SHOWN)
    for trial in sorted(front, key=lambda t: t.value("size") or 0.0)[:8]:
        grid.add_row(Text(trial.recipe, style="green"), *(show(trial.value(n), METRICS[n].unit) for n in SHOWN))
    return grid


def scatter(trials: Sequence[Trial], front: Sequence[int], x: str, y: str) -> Text:
    """Measured trials as points on a WIDTH x HEIGHT grid, x logarithmic; the front bright, the rest grey."""
    points = [(t.value(x), t.value(y), t.number in front) for t in trials]
    known = [(math.log(a), b, best) for a, b, best in points if a is not None and a > 0 and b is not None]
    if not known:
        return Text("the first point appears when the parent is measured", style="dim")
    left, right = min(p[0] for p in known), max(p[0] for p in known)
    low, high = min(p[1] for p in known), max(p[1] for p in known)
    cells: dict[tuple[int, int], bool] = {}
    for a, b, best in known:
        column = round((a - left) / (right - left) * (WIDTH - 1)) if right > left else WIDTH // 2
        row = round((b - low) / (high - low) * (HEIGHT - 1)) if high > low else HEIGHT // 2
        cells[row, column] = cells.get((row, column), False) or best
    text = Text()
    for row in reversed(range(HEIGHT)):
        label = show(high, METRICS[y].unit) if row == HEIGHT - 1 else show(low, METRICS[y].unit) if row == 0 else ""
        text.append(f"{label:>9} │", style="dim")
        for column in range(WIDTH):
            best_here = cells.get((row, column))
            text.append(" " if best_here is None else "●" if best_here else "·",
                        style="bold green" if best_here else "dim")
        text.append("\n")
    ends = show(math.exp(left), METRICS[x].unit), show(math.exp(right), METRICS[x].unit)
    text.append(f"{y:>9} └{'─' * WIDTH}\n", style="dim")
    text.append(f"{'':>11}{ends[0]}{x:^{max(1, WIDTH - len(ends[0]) - len(ends[1]))}}{ends[1]}", style="dim")
    return text
