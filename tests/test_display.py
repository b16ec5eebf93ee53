"""What a person reads: intervals in the unit of their number, and how each ratio was obtained."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fivefold.budget import TrainingBudget
from fivefold.display import live
from fivefold.display.static import number
from fivefold.display.study import _reasons, _side_by_side, ratio_lines
from fivefold.display.train import LiveTraining, trained
from fivefold.meters.ledger import Cost
from fivefold.model import TrainPlan
from fivefold.quantity import Measurement, Quantity
from fivefold.recipe import Recipe
from fivefold.study import events as ev
from fivefold.study.forecast import Forecast
from fivefold.study.in_turn import failed
from fivefold.study.judged import Judged
from fivefold.study.request import Finished, Planned
from fivefold.study.trial import Outcome, Trial
from fivefold.study.watch import Progress
from fivefold.tasks.paired import verdict
from fivefold.training.memory import Needs


def quantity(value: float, unit: str, low: float, high: float) -> Quantity:
    return Quantity(value=value, unit=unit, method="measured", n=6, low=low, high=high)


def trial(number_: int, **changes: object) -> Trial:
    made = Trial(number=number_, recipe="threads(count=1)" if number_ else "parent", outcome=Outcome.MEASURED,
                 measurement=Measurement({"ttft": quantity(0.3, "s", 0.2, 0.4)}))
    return made.but(**changes)


PAIRED = Measurement({"ttft": quantity(0.25, "x", 0.2, 0.3)},
                     {"outcome": "measured", "sentence": "", "rounds": 4, "requests": 2})


@pytest.mark.parametrize(("q", "shown"), [
    (quantity(0.0187, "s", 0.000174, 0.0693), "● 18.7 ms [0.174, 69.3]"),
    (quantity(0.932, "fraction", 0.912, 0.948), "● 93.2 % [91.2, 94.8]"),
    (quantity(0.339, "USD/Mtoken", 0.318, 0.361), "● $0.339/Mtoken [$0.318, $0.361]"),
    (quantity(1500.0, "token/s", 900.0, 2100.0), "● 1,500 token/s [900, 2,100]"),
    (quantity(2.6e8, "byte", 2.5e8, 2.6e8), "● 260 MB [250, 260]"),
])
def test_an_interval_is_in_the_unit_of_its_number(q: Quantity, shown: str) -> None:
    assert str(number(q)) == shown


def test_every_ratio_says_how_it_was_obtained() -> None:
    lines = ratio_lines([trial(0), trial(1, paired=PAIRED), trial(2, paired=PAIRED), trial(3)], "5 s are left")
    assert lines == [
        "ratios of trials 1, 2: measured in turn with the parent, median over 4 rounds of 2 requests",
        "ratios of trial 3: from separate measurements, minutes apart (5 s are left)",
    ]


def test_picks_show_the_ratio_with_its_interval() -> None:
    out = Console(file=io.StringIO(), width=200)
    _side_by_side([("parent", trial(0), {}), ("smallest", trial(1), {"ttft": PAIRED["ttft"]})], out)
    assert "0.25x [0.2, 0.3]" in out.file.getvalue()  # type: ignore[attr-defined]
    assert "accuracy" not in out.file.getvalue()  # type: ignore[attr-defined]


def test_the_live_view_tells_what_came_of_measuring_in_turn() -> None:
    out = Console(file=io.StringIO(), width=200)
    view = live.LiveStudy(out)
    view(ev.Paired((trial(1, paired=PAIRED), trial(2, paired=failed(Outcome.CRASHED, "the engine gave up")))))
    said = out.file.getvalue()  # type: ignore[attr-defined]
    assert "ttft 0.25x" in said and "crashed: the engine gave up" in said


NEEDS = Needs(process=4e8, weights=2e8, beside=0.0, gradients=1e6, state=2e6, activations=3e7, head=4e6, loading=5e8)
FITS = Forecast(recipe=Recipe.parse("lora(rank=4)"), plan=TrainPlan(), needs=NEEDS, trained=12_345, seconds=90.0,
                joules=400.0, usd=0.002, per_step=1.0)
REFUSED = Forecast(recipe=Recipe.parse("full"), plan=TrainPlan(), needs=NEEDS, refused="memory",
                   why_not="needs 4 GB of memory; the largest part is the weights (2 GB)")


def planned(*found: Forecast, resumed: int = 0) -> Planned:
    return Planned(forecasts=found, chosen=FITS, budget=TrainingBudget(), rows=190, held_out=10, tokens=5000,
                   judged="9 rows", resumed=resumed)


def progress(step: int, **more: object) -> Progress:
    told = {"steps": 200, "loss": 1.5, "score": None, "tokens_per_second": 1234.0, "left": 30.0, "seconds": 60.0,
            "joules": 25.0, "usd": 0.001, "memory": 812_000_000, **more}
    return Progress(step=step, **told)  # type: ignore[arg-type]


def said(*events: object, **console: object) -> str:
    out = Console(file=io.StringIO(), width=100, **console)  # type: ignore[arg-type]
    with LiveTraining(out) as view:
        for event in events:
            view(event)  # type: ignore[arg-type]
    return out.file.getvalue()  # type: ignore[attr-defined]


def test_forecasts_show_what_fits_what_does_not_and_what_it_is_made_of() -> None:
    text = said(planned(FITS, REFUSED, resumed=40))
    assert "190 examples (5,000 tokens), 10 more held out, judged on 9 rows" in text
    row = next(line for line in text.splitlines() if line.startswith("lora(rank=4) "))
    assert row.split() == ["lora(rank=4)", "12,345", "648", "MB", "90", "s", "400", "J", "$0.002", "chosen"]
    assert "not full: needs 4 GB of memory; the largest part is the weights (2 GB)" in text
    assert "memory of lora(rank=4): process 400 MB + weights 200 MB + gradients 1 MB + optimiser 2 MB" in text
    assert "going on after step 40" in text and "going on" not in said(planned(FITS))


def test_a_bar_shows_loss_speed_memory_joules_and_money() -> None:
    text = said(*(progress(n, score=1.25 if n == 100 else None, joules=None if n == 200 else 25.0)
                  for n in range(1, 201)))
    lines = text.splitlines()
    assert 10 <= len(lines) <= 12, "a few lines without a terminal"
    middle = next(line for line in lines if " 100/200" in line)
    assert middle.startswith("━" * 12 + "╌" * 12) and "loss 1.5000" in middle and "held-out 1.2500" in middle
    assert "1,234 tokens/s  812 MB  25 J  $0.001  60 s, 30 s left" in middle
    assert "- J" in lines[-1] and "200/200" in lines[-1] and "held-out 1.2500" in lines[-1]


def test_the_loss_shown_is_a_running_mean() -> None:
    view = LiveTraining(Console(file=io.StringIO()))
    for loss in (2.0, 1.0):
        view(progress(1, loss=loss))
    assert "loss 1.9000" in view.lines(progress(2))[0]


@pytest.mark.parametrize(("seconds", "shown"), [(0.2, "< 1 s"), (90.0, "90 s"), (600.0, "10 min"), (9000.0, "2.5 h")])
def test_durations(seconds: float, shown: str) -> None:
    assert f"  {shown}, {shown} left" in said(progress(200, seconds=seconds, left=seconds))


def test_what_a_run_left() -> None:
    parent, card = (
        Measurement({"loss": quantity(loss, "nat/token", loss - 0.1, loss + 0.1),
                     "accuracy": quantity(right, "fraction", right - 0.15, right + 0.15)})
        for loss, right in ((2.0, 0.5), (1.0, 0.75))
    )
    judged = Judged(parent=parent, card=card, items="40 rows", verdict=verdict([0.0, 1.0] * 20, [1.0] * 40, 0.0))
    cost = Cost.of({"seconds": quantity(61.0, "s", 61.0, 61.0), "energy": quantity(500.0, "J", 400.0, 600.0),
                    "memory": quantity(9e8, "byte", 9e8, 9e8)})
    out = Console(file=io.StringIO(), width=100)
    trained(Finished(
        folder=Path("runs/[bold]"), artifact=None, recipe="lora(rank=4)", steps=30, numbers=4096,  # type: ignore[arg-type]
        delta_bytes=19_000_000, before=2.0, after=1.0, cost=cost, predicted_peak=9.9e8, judged=judged,
        stopped="the time of 60 s is used up",
    ), out)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    for needle in ("lora(rank=4): 30 steps, 4,096 numbers trained, held-out loss 2.0000 -> 1.0000", "judged on 40 rows",
                   "stopped early: the time of 60 s is used up", "● 75.0 % [60.0, 90.0]", "against the parent: accept",
                   "990 MB (+10%)", "19 MB to send", "fivefold serve runs/[bold]/model", "- not recorded",
                   "fivefold ship runs/[bold] --to my-model", "fivefold optimize runs/[bold]/model"):
        assert needle in text, needle


def test_an_interrupted_bar_leaves_the_terminal_as_it_was() -> None:
    out = Console(file=io.StringIO(), force_terminal=True, width=100)
    with pytest.raises(KeyboardInterrupt), LiveTraining(out) as view:
        view(planned(FITS))
        view(progress(1))
        raise KeyboardInterrupt
    text = out.file.getvalue()  # type: ignore[attr-defined]
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert hidden in text and text.rindex(shown) > text.rindex(hidden), "the cursor is back"


def test_other_verbs_start_without_torch() -> None:
    code = "import fivefold.display, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_not_searched_for_one_reason_is_one_line() -> None:
    dropped = {"lora": "lora needs examples", "full": "full needs examples", "int4": "int4 needs a torch graph",
               "gguf(x)": "left out"}
    assert _reasons({n: why for n, why in dropped.items() if "(" not in n}) == {
        "needs examples": ["lora", "full"], "needs a torch graph": ["int4"]}
