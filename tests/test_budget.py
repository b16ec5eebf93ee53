import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fivefold.budget import Allowance, Budget, TrainingBudget, objectives, size
from fivefold.errors import BudgetError
from fivefold.metrics import METRICS


def test_units_reach_the_base_unit() -> None:
    budget = Budget.parse("memory<=260MB, size<=1MiB, latency<=20ms/token, agreement>=85%, energy<=2mJ, money<=$3")
    assert [limit.value for limit in budget] == [260e6, 2**20, 0.02, 0.85, 0.002, 3.0]
    assert Budget.parse(str(budget)) == budget


def test_relative_limits_follow_the_parent() -> None:
    budget = Budget.parse("memory<=0.25x, decode>=2x")
    parent = {"memory": 400.0, "decode": 10.0}
    assert budget.met({"memory": 100.0, "decode": 20.0}, parent)
    assert not budget.met({"memory": 101.0, "decode": 20.0}, parent)
    assert budget.excess({"memory": 150.0, "decode": 20.0}, parent) == pytest.approx(0.5)
    assert budget.excess({"memory": 150.0, "decode": 20.0}, {}) == math.inf


def test_an_unknown_value_never_meets_a_limit() -> None:
    assert not Budget.parse("memory<=1GB").met({"memory": None}, {})


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("memory<=260XB", "unit 'XB'"), ("mem<=3", "did you mean memory"), ("memory>=3MB", "better lower"),
        ("agreement<=0.9", "better higher"), ("agreement>=abc", "cannot read"), ("memory", "cannot read"),
        ("memory<=1e999MB", "not a number"), ("memory<=-4MB", "at least 0"), ("x" * 3000, "2000"),
    ],
)
def test_bad_budgets_get_one_sentence(text: str, needle: str) -> None:
    with pytest.raises(BudgetError, match=needle) as caught:
        Budget.parse(text)
    assert "\n" not in str(caught.value)


def test_allowance_units_name_the_limit() -> None:
    assert Allowance.parse("8min, 2Wh, $1.5, 4GB") == Allowance(time=480, energy=7200, money=1.5, disk=4e9)
    for bad in ("8", "8 parsecs", "1min, 2h", "min"):
        with pytest.raises(BudgetError):
            Allowance.parse(bad)


def test_a_training_budget_has_units_of_its_own() -> None:
    parsed = TrainingBudget.parse("memory<=2GB, time <= 20 min, energy<5Wh, money<=$0.1")
    assert parsed == TrainingBudget(memory=2e9, time=1200.0, energy=18_000.0, money=0.1)
    assert TrainingBudget.parse("memory<=1.5GiB") == TrainingBudget(memory=1.5 * 2**30)
    assert TrainingBudget.parse("money<=20cent, energy<=2kJ, time<=1h") == TrainingBudget(
        money=0.2, energy=2000.0, time=3600.0)
    assert TrainingBudget.parse(" , ") == TrainingBudget()


@pytest.mark.parametrize(("text", "needle"), [
    ("memry<=2GB", "did you mean memory"), ("latency<=2ms", "write it like memory<=2GB"),
    ("memory>=2GB", "cannot read"), ("memory=2GB", "cannot read"), ("time<=20", "no unit of time"),
    ("memory<=2", "has no unit of memory; use one of: B, kB"),
    ("memory<=2XB", "no unit of memory"), ("time<=2GB", "no unit of time"), ("money<=$5min", "no unit of money"),
    ("memory<=0.5x", "no unit of memory"), ("time<=1h, time<=2h", "limits time twice"), ("energy<=-1J", "at least 0"),
    ("memory<=1e999GB", "not a number"), ("memory<=..GB", "not a number"), ("2GB", "cannot read"), ("x" * 3000, "2000"),
])
def test_bad_training_budgets_get_one_sentence(text: str, needle: str) -> None:
    with pytest.raises(BudgetError, match=needle) as caught:
        TrainingBudget.parse(text)
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


def test_a_size_is_bytes() -> None:
    assert [size("1GB"), size("1.5 KiB"), size("7B"), size("2kB")] == [10**9, 1536, 7, 2000]
    for bad in ("", "1", "GB", "1XB", "-1GB", "$3", "5min"):
        with pytest.raises(BudgetError):
            size(bad)


def test_objectives() -> None:
    assert objectives("latency, energy,size,latency") == ("latency", "energy", "size")
    with pytest.raises(BudgetError, match="did you mean latency"):
        objectives("latencyy")
    with pytest.raises(BudgetError, match="no objective"):
        objectives(" , ")


@given(st.text(max_size=80))
def test_any_text_parses_or_is_refused(text: str) -> None:
    for parse in (Budget.parse, Allowance.parse, TrainingBudget.parse, objectives, size):
        try:
            parse(text)
        except BudgetError as error:
            assert "\n" not in str(error)


@given(st.sampled_from(sorted(METRICS)), st.floats(0, 1e12), st.sampled_from(["", "x"]))
def test_every_metric_can_be_limited(name: str, value: float, unit: str) -> None:
    sign = "<=" if METRICS[name].better == "lower" else ">="
    budget = Budget.parse(f"{name}{sign}{value!r}{unit}")
    assert budget.limits[0].value == value
    assert Budget.parse(str(budget)) == budget
