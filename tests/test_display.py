"""What a person reads: intervals in the unit of their number, and how each ratio was obtained."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fivefold.display import live
from fivefold.display.static import number
from fivefold.display.study import _side_by_side, ratio_lines
from fivefold.quantity import Measurement, Quantity
from fivefold.study import events as ev
from fivefold.study.in_turn import failed
from fivefold.study.trial import Outcome, Trial


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
