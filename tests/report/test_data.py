"""The page's data says what the records say: no number is lost, made up, or without its method."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fivefold.quantity import Measurement, Quantity
from fivefold.report.data import cell, change, number, payload
from fivefold.study.trial import Outcome, Trial


def test_every_measured_number_arrives_with_method_and_interval(study: Any) -> None:
    trials, meta, analysis = study
    data = payload(trials, meta, analysis)
    for trial, row in zip(trials, data["trials"], strict=True):
        assert (row["number"], row["recipe"], row["outcome"]) == (trial.number, trial.recipe, str(trial.outcome))
        if trial.outcome is not Outcome.MEASURED:
            assert row["values"] == {}
            continue
        for name, q in trial.measurement.items():
            c = row["values"][name]
            assert (c["v"], c.get("lo"), c.get("hi"), c["m"], c["n"]) == (q.value, q.low, q.high, q.method, q.n)
            factor = data["metrics"][name]["factor"]
            assert float(c["t"].replace(",", "").replace("−", "-")) == pytest.approx(q.value / factor, rel=6e-3)


def test_units_fit_the_numbers(study: Any) -> None:
    metrics = payload(*study)["metrics"]
    assert (metrics["size"]["unit"], metrics["size"]["factor"]) == ("MB", 1e6)
    assert metrics["latency"]["unit"] == "ms/token"
    assert metrics["agreement"]["unit"] == "%"


def test_the_budget_is_applied_and_placed(study: Any) -> None:
    trials, meta, analysis = study
    data = payload(trials, meta, analysis)
    assert data["bounds"]["memory"]["limit"] == 250e6
    for trial, row in zip(trials, data["trials"], strict=True):
        memory, agreement = trial.value("memory"), trial.value("agreement")
        if memory is None or agreement is None:
            assert row["fits"] is None
        else:
            assert row["fits"] == (memory <= 250e6 and agreement >= 0.9)


def test_a_relative_limit_is_placed_against_the_parent(study: Any) -> None:
    trials, _, analysis = study
    data = payload(trials, {"settings": {"budget": "size<=0.25x"}}, analysis)
    assert data["bounds"]["size"]["limit"] == pytest.approx(0.25 * trials[0].value("size"))
    assert payload(trials, {"settings": {"budget": "speed<=1"}}, analysis)["budget_trouble"]


def test_spend_is_the_sum_by_phase(study: Any) -> None:
    trials, meta, analysis = study
    spend = payload(trials, meta, analysis)["spend"]
    assert dict(spend["phases"]) == {
        "build": 4 * len(trials), "screen": 2 * len(trials), "measure": 6 * len(trials), "quality": 3 * len(trials),
        "overhead": len(trials),
    }
    assert spend["total"] == 16 * len(trials)
    assert spend["energy.J"] == 300 * len(trials)


def test_typed_inputs_are_shown_and_hashes_are_kept_for_the_end(study: Any) -> None:
    trials, _, analysis = study
    meta = {"name": "tiny", "settings": {"model": "a1b2", "budget": "", "workload": "c3d4", "seed": "0"},
            "inputs": {"workload": "chat"}}
    data = payload(trials, meta, analysis)
    assert data["title"] == "tiny"
    assert data["settings"] == {"workload": "chat", "seed": "0"}
    assert ["model", "a1b2"] in data["contexts"]


def test_what_is_missing_says_why(study: Any) -> None:
    trials, meta, _ = study
    bare = payload(trials, meta, {})
    for part in ("picks", "effects", "interactions", "backfired", "payback", "predictor"):
        assert bare[part]["rows"] == [] and bare[part]["why"] == "the study has not been analysed yet"
    told = payload(trials, meta, {"missing": {"effects": "only one trial was measured"}})
    assert told["effects"]["why"] == "only one trial was measured"


@pytest.mark.parametrize("shape", [3, "text", [1, 2], [{"role": "x"}], {"a": 1}, [None]])
def test_an_analysis_of_another_shape_is_missing_not_a_crash(study: Any, shape: Any) -> None:
    trials, meta, _ = study
    parts = ("picks", "effects", "interactions", "backfired", "payback", "predictor", "screen", "front", "missing")
    data = payload(trials, meta, dict.fromkeys(parts, shape))
    assert data["effects"]["rows"] == [] and data["effects"]["why"]
    json.dumps(data, allow_nan=False)


def test_numbers_that_are_not_finite_are_missing(trial: Callable[..., Trial]) -> None:
    bad = Measurement({"latency": Quantity(value=math.inf, unit="s/token", method="measured", low=math.nan, high=1.0),
                       "size": Quantity.missing("byte", "the file was removed")})
    data = payload([trial(measurement=bad)], {}, {})
    assert "v" not in data["trials"][0]["values"]["latency"]
    assert data["trials"][0]["values"]["size"]["r"] == "the file was removed"
    json.dumps(data, allow_nan=False)


def test_no_trials_at_all() -> None:
    json.dumps(payload([], {}, {}), allow_nan=False)


@given(st.floats(1e-300, 1e300) | st.floats(-1e300, -1e-300))
def test_three_digits_are_kept(value: float) -> None:
    text = number(value).replace(",", "").replace("−", "-")
    assert float(text) == pytest.approx(value, rel=5.1e-3)


def test_changes_are_signed_percentages() -> None:
    q = Quantity(value=-0.31, unit="fraction", method="measured", n=5, low=-0.35, high=-0.28)
    assert change(q.to_json())["t"] == "−31.0"
    assert change(q.to_json())["i"] == "−35.0 to −28.0"
    assert change(q.to_json())["u"] == "%"
    assert change(q.to_json(), "agreement")["u"] == "points"
    nats = Quantity(value=0.2, unit="nat/token", method="measured")
    assert (change(nats.to_json(), "kl")["t"], change(nats.to_json(), "kl")["u"]) == ("+0.200", "nat/token")
    assert cell(Quantity(value=2.6e8, unit="byte", method="counted"))["t"] == "260"
