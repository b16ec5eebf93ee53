"""First guesses of quality: the rule by bits, moved or multiplied by what records say."""

from __future__ import annotations

from typing import Any

import pytest

from fivefold.recipe import Recipe, catalogue
from fivefold.study import records
from fivefold.study.records import guess


def record(with_: tuple[float, float, float], without: tuple[float, float, float]) -> dict[str, Any]:
    names = ("bits", "agreement", "kl")
    return {"with": dict(zip(names, with_, strict=True)), "without": dict(zip(names, without, strict=True))}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "int4": record((4.5, 0.6, 0.56), (16.0, 1.0, 0.0)),
        "wanda": record((16.0, 0.4, 1.5), (16.0, 0.8, 0.5)),
    }
    monkeypatch.setattr(records, "records", lambda: found)


@pytest.mark.usefixtures("made_up")
def test_the_rule_alone_halves_what_changes_every_so_many_bits() -> None:
    plain = Recipe.parse("threads(count=1)")
    assert guess("agreement", plain, 5.1) == pytest.approx(0.8)
    assert guess("agreement", plain, 6.9) == pytest.approx(0.9)
    assert guess("kl", plain, 6.0) == pytest.approx(0.07)
    assert guess("latency", plain, 5.1) is None


@pytest.mark.usefixtures("made_up")
def test_a_recipe_on_record_is_guessed_as_recorded_and_more_bits_are_better() -> None:
    stored = Recipe.parse("int4")
    assert guess("agreement", stored, 4.5) == pytest.approx(0.6)
    assert guess("kl", stored, 4.5) == pytest.approx(0.56)
    assert guess("agreement", stored, 4.5 + 1.8) == pytest.approx(0.8)
    assert guess("kl", stored, 4.5 - 0.9) == pytest.approx(1.12)


@pytest.mark.usefixtures("made_up")
def test_what_stores_nothing_keeps_its_share_and_adds_its_kl() -> None:
    pruned = Recipe.parse("wanda")
    assert guess("agreement", pruned, 6.9) == pytest.approx(0.9 * 0.5)
    assert guess("kl", pruned, 6.0) == pytest.approx(0.07 + 1.0)
    both = Recipe.parse("wanda + int4")
    assert guess("agreement", both, 4.5) == pytest.approx(0.6 * 0.5)


@pytest.mark.usefixtures("made_up")
def test_a_task_loses_a_quarter_of_what_tokens_lose_and_needs_the_parents_score() -> None:
    plain = Recipe()
    assert guess("accuracy", plain, 5.1, 0.6) == pytest.approx(0.6 * 0.95)
    assert guess("accuracy", plain, 5.1) is None
    assert guess("flips", plain, 5.1) == pytest.approx(0.2 / 4)
    assert guess("choice_ece", plain, 5.1, 0.1) == 0.1


def test_guesses_stay_within_what_can_be() -> None:
    for name in records.records():
        recipe = Recipe.parse(records.records()[name]["with"]["recipe"])
        for bits in (1.0, 4.0, 16.0, 32.0):
            agreement, kl = guess("agreement", recipe, bits), guess("kl", recipe, bits)
            assert agreement is not None and 0 <= agreement <= 1 and kl is not None and kl > 0


def test_the_records_speak_of_techniques_there_are() -> None:
    for name, record in records.records().items():
        assert name in {t.name for t in Recipe.parse(record["with"]["recipe"])}
        assert Recipe.parse(record["without"]["recipe"]) != Recipe.parse(record["with"]["recipe"])
        assert name in catalogue()
