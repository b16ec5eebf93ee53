"""Which ways are considered, and which of them is chosen."""

from __future__ import annotations

import pytest

from fivefold.budget import TrainingBudget
from fivefold.errors import Infeasible, UserError
from fivefold.model import TrainPlan
from fivefold.recipe import Recipe, catalogue
from fivefold.study.forecast import ORDER, Forecast, choose, ways
from fivefold.study.resident import rehearsed
from fivefold.testing.contract import sentence
from fivefold.training.memory import Needs
from fivefold.training.method import Adaptation


def forecasts(*given: tuple[str, float, str]) -> list[Forecast]:
    zero = {"weights": 0.0, "beside": 0.0, "gradients": 0.0, "state": 0.0, "activations": 0.0, "head": 0.0}
    return [Forecast(recipe=Recipe.parse(name), plan=TrainPlan(), per_step=peak / 1e9, why_not=refused and "needs it",
                     needs=None if refused == "model" else Needs(process=peak, **zero), refused=refused)  # type: ignore[arg-type]
            for name, peak, refused in given]


def test_the_first_that_fits_is_chosen() -> None:
    found = forecasts(("lora", 5e8, "memory"), ("full", 3e8, ""), ("mezo", 1e8, ""))
    assert choose(found, TrainingBudget(memory=4e8)) is found[1]


def test_nothing_fits_names_the_smallest_and_what_it_needs() -> None:
    found = forecasts(("lora", 5e8, "memory"), ("qlora", 1e8, "model"), ("mezo", 3.1415e8, "memory"))
    with pytest.raises(Infeasible, match=r"fits 100 MB: the smallest, mezo, needs it; allow 315 MB") as caught:
        choose(found, TrainingBudget(memory=1e8))
    assert sentence(caught.value) and caught.value.exit_code == 3
    with pytest.raises(Infeasible, match="lora does not fit 100 MB: it needs it; allow 500 MB, or leave --recipe out"):
        choose(found[:1], TrainingBudget(memory=1e8))


def test_nothing_fits_the_time_names_the_fastest() -> None:
    found = forecasts(("lora", 5e8, "time"), ("full", 9e8, "time"), ("mezo", 1e8, "memory"))
    with pytest.raises(Infeasible, match=r"time<=3 s: the fastest, lora, needs it; allow more time") as caught:
        choose(found, TrainingBudget(time=3.0))
    sentence(caught.value)


def test_no_way_for_this_model_is_its_own_sentence() -> None:
    with pytest.raises(UserError, match="needs it"):
        choose(forecasts(("lora", 1.0, "model")), TrainingBudget())


def test_ways_begin_with_the_order_and_name_each_technique() -> None:
    found = [str(recipe) for recipe in ways()]
    assert found[: len(ORDER)] == [str(Recipe.parse(way)) for way in ORDER] and len(set(found)) == len(found)
    kinds = {n for n, t in catalogue().items() if t.__module__.split(".")[-2] == "finetuning"}
    assert kinds == {part for way in found for part in way.split(" + ")}
    assert [str(r) for r in ways("lora(rank=2)")] == ["lora(rank=2)"]
    for bad, needle in (('gguf(type="q8_0")', "gguf is none"), ("lora + threads(count=1)", "threads is none"),
                        ("parent", "none was given")):
        with pytest.raises(UserError, match=needle) as caught:
            ways(bad)
        sentence(caught.value)


def test_libraries_are_those_of_the_adaptation() -> None:
    through = {n for n, t in catalogue().items() if issubclass(t, Adaptation) and t.libraries}
    assert through == {"lora", "dora", "adalora", "ia3", "prefix", "qlora"}
    assert (rehearsed(()), rehearsed(("peft",))) == ("full", "lora")
