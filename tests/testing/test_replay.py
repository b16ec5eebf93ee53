"""A replayed study sees the recorded numbers and nothing else; tables survive a file."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from fivefold.errors import DataError, OutOfMemory, UserError
from fivefold.recipe import Recipe
from fivefold.study.trial import Outcome
from fivefold.testing import ReplayMeter, Table

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from made_up import made_up_table, trial


def test_a_table_survives_a_file(tmp_path: Path) -> None:
    table = Table.of(made_up_table())
    table.save(tmp_path / "t.json")
    again = Table.load(tmp_path / "t.json")
    assert {k: t.to_json() for k, t in again.trials.items()} == {k: t.to_json() for k, t in table.trials.items()}


@pytest.mark.parametrize("text", ["", "[]", '{"trials": []}', '{"trials": [{"number": 1}]}'])
def test_what_is_no_table_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DataError):
        Table.load(tmp_path / "t.json")


def test_the_space_offers_what_was_recorded_and_all_of_it() -> None:
    table = Table.of(made_up_table())
    space, seen = table.space(), {"parent"}
    rng = random.Random(0)
    while (recipe := space.draw(rng, seen)) is not None:
        seen.add(str(recipe))
    assert seen == set(table.trials)
    assert space.recipe({"threads": {"count": 1}, "kv_cache": {"type": "q8_0"}}) is None


def test_the_meter_answers_from_the_table() -> None:
    table = Table.of(made_up_table())
    meter = ReplayMeter(table)
    for text, recorded in table.trials.items():
        recipe = Recipe.parse(text)
        if recorded.outcome is Outcome.OUT_OF_MEMORY:
            with pytest.raises(OutOfMemory, match="cap"):
                meter.build(recipe, 1, print)
            continue
        built, measured = meter.build(recipe, 1, print), meter.measure(recipe, 1, None, print)
        assert measured.measurement == recorded.measurement and built.screen == recorded.screen
        assert {**built.spent, **measured.spent} == recorded.spent


def test_what_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(UserError, match="not in the table"):
        ReplayMeter(Table.of(made_up_table())).build(Recipe.parse("threads(count=7)"), 1, print)
    with pytest.raises(DataError, match="no parent"):
        Table.of([trial(0, "threads(count=1)", latency=1.0)])
