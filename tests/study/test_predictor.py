"""Physics by hand, evidence by the ratio of trials, objections in sentences."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import FFN, LAYERS, VOCAB, WIDTH, formula, machine, measured, trial

from fivefold.budget import Budget
from fivefold.engines._type_speed import TypeSpeeds
from fivefold.model import Model
from fivefold.recipe import Recipe
from fivefold.study import predictor as predicting
from fivefold.study.pareto import Goal
from fivefold.study.predictor import Predictor, errors
from fivefold.study.trial import Outcome
from fivefold.techniques.inference.mixed_precision import MixedPrecision

MATRICES = LAYERS * (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * FFN)
Q8, Q4 = Recipe.parse('gguf(type="q8_0")'), Recipe.parse('gguf(type="q4_0", embedding="q8_0")')


@pytest.fixture
def predictor(bare: Model) -> Predictor:
    return Predictor(machine(), bare, prompt=100, output=50)


def test_size_is_bits_times_weights(predictor: Predictor) -> None:
    assert predictor.physics(Q8)["size"] == pytest.approx((MATRICES + VOCAB * WIDTH) * 8.5 / 8)
    assert predictor.physics(Q4)["size"] == pytest.approx((MATRICES * 4.5 + VOCAB * WIDTH * 8.5) / 8)
    parent = predictor.physics(Recipe())["size"]
    assert parent == pytest.approx(predictor.model.path.joinpath("model.safetensors").stat().st_size)


def test_latency_is_bytes_over_bandwidth(predictor: Predictor) -> None:
    one, two = (predictor.physics(Recipe.parse(f'gguf(type="q8_0") + threads(count={n})')) for n in (1, 2))
    assert one["latency"] == pytest.approx(2 * two["latency"])
    size = predictor.physics(Q8)["size"] + predictor.model.blueprint.cache_bytes_per_token(2.0) * 126
    assert two["latency"] == pytest.approx(size / 1e10 / 0.34)
    assert two["request"] == pytest.approx(two["ttft"] + 49 * two["latency"])


def test_evidence_of_the_same_engine_and_type_replaces_the_table(predictor: Predictor) -> None:
    raw = predictor.physics(Q8)
    history = [trial(0, str(Q8), latency=3 * raw["latency"])]
    forecast = predictor.after(history)
    assert forecast.predict(Q8).value("latency") == pytest.approx(3 * raw["latency"], rel=0.01)
    two = Recipe.parse('gguf(type="q8_0") + threads(count=1)')
    assert forecast.predict(two).value("latency") == pytest.approx(3 * predictor.physics(two)["latency"], rel=0.03)
    assert predictor.after([]).predict(Q8)["latency"].reason == "not calibrated by a trial yet"
    assert all(q.method == "modelled" for q in forecast.predict(Q8).values())


def test_trials_that_were_not_measured_teach_no_speed(predictor: Predictor) -> None:
    history = [trial(0, str(Q8), Outcome.SCREENED, latency=1.0)]
    assert predictor.after(history).predict(Q8).value("latency") == pytest.approx(predictor.physics(Q8)["latency"])


def test_errors_judge_the_stored_prediction(predictor: Predictor) -> None:
    guesses = enumerate((1.1, 0.7, 1.5))
    trials = [trial(i, str(Q8), latency=1.0).but(predicted=measured({"latency": g})) for i, g in guesses]
    found = errors(trials)["latency"]
    assert found.value == pytest.approx(0.3) and found.n == 3
    assert errors([trial(0, "parent", latency=1.0).but(predicted=measured({"latency": 5.0}))]) == {}


def test_objections_name_the_limit(predictor: Predictor) -> None:
    parent = formula("parent")
    forecast = predictor.after([])
    size = predictor.physics(Recipe())["size"]

    def said(recipe: Recipe, budget: str, objectives: tuple[str, ...] = ("latency",)) -> str | None:
        goal = Goal(objectives, Budget.parse(budget))
        return forecast.objection(recipe, forecast.predict(recipe), goal, {**parent, "size": size, "request": 1.0})

    assert said(Q8, "size<=0.5x") is None
    assert "size<=0.2x" in (said(Q8, "size<=0.2x") or "")
    assert said(Q8, "agreement>=0.99") is None, "quality is not predicted, so it is no reason"
    assert said(Q8, "size<=0.26x") is None, "within the margin the study decides, not the model"


def test_slower_than_the_parent_is_an_objection_when_time_matters(predictor: Predictor) -> None:
    raw = predictor.physics(Q8)["request"]
    history = [trial(0, "parent", request=raw / 4), *(
        trial(i, str(Q8), request=raw).but(predicted=measured({"request": raw})) for i in (1, 2)
    )]
    forecast = predictor.after(history)
    predicted = forecast.predict(Q8)
    assert "times as long" in (forecast.objection(Q8, predicted, Goal(("energy",)), {"request": raw / 4}) or "")
    assert forecast.objection(Q8, predicted, Goal(("size",)), {"request": raw / 4}) is None
    assert forecast.objection(Q8, predicted, Goal(("energy",)), {"request": raw}) is None


def test_seconds_count_no_prefix_twice(predictor: Predictor) -> None:
    built = trial(1, 'prune_depth(layers=1) + gguf(type="q8_0")').but(
        artifact="k",
        spent={"step.prune_depth": 7.0, "step.gguf": 3.0, "step.export": 2.0, "measure": 4.0, "quality": 1.0},
    )
    forecast = predictor.after([trial(0, "parent", latency=1.0), built])
    seconds = {
        text: forecast.seconds(Recipe.parse(text))["build"] for text in (
            'prune_depth(layers=1) + gguf(type="q8_0") + threads(count=1)',
            'prune_depth(layers=1) + gguf(type="q4_0")', 'prune_depth(layers=2) + gguf(type="q4_0")',
            "threads(count=1)",
        )
    }
    again, other_type, other_depth, runtime = seconds.values()
    assert again == runtime == 0.0
    assert 2.0 < other_type < 5.0, "the export is due again, of the step what its settings do not share"
    assert other_type < other_depth < 12.0, "the pass over the text that all depths share was paid for"
    assert math.isfinite(sum(predictor.after([]).seconds(Q8).values()))


SPEEDS = TypeSpeeds(
    threads=2, decode={"q8_0": 2e-9, "q4_0": 1e-9, "iq4_nl": 1e-9, "q5_0": 4e-9, "q5_1": 5e-9},
    head={"q8_0": 3e-9, "q4_0": 2e-9, "iq4_nl": 2e-9, "q5_0": 4e-9, "q5_1": 5e-9}, prefill={"q8_0": 1e-10},
    base={"layer": 2e-5, "attended": 1e-10},
    scale={1: (1.5, 2.0)},
)


def with_table(monkeypatch: pytest.MonkeyPatch, speeds: TypeSpeeds | None) -> None:
    monkeypatch.setattr(predicting, "known", lambda blueprint, machine_id: speeds)


def test_a_measured_table_replaces_the_rough_one(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    rough = predictor.physics(Recipe())["latency"]
    with_table(monkeypatch, SPEEDS)
    timed = Predictor(machine(), predictor.model, prompt=100, output=50)
    table, units = VOCAB * WIDTH, predictor.model.blueprint.heads * predictor.model.blueprint.head_dim
    fixed = LAYERS * (2e-5 + 1e-10 * 125 * units)
    assert timed.physics(Q8)["latency"] == pytest.approx(fixed + 2e-9 * MATRICES + 3e-9 * table)
    assert timed.physics(Q4)["latency"] == pytest.approx(fixed + 1e-9 * MATRICES + 3e-9 * table)
    last = WIDTH * WIDTH + 3 * WIDTH * FFN
    prompt = 100 * 1e-10 * (MATRICES - last) + 3e-9 * table
    assert timed.physics(Q8)["ttft"] == pytest.approx(prompt)
    one = Recipe.parse('gguf(type="q8_0") + threads(count=1)')
    assert timed.physics(one)["latency"] == pytest.approx(1.5 * timed.physics(Q8)["latency"])
    assert timed.physics(Recipe())["latency"] == pytest.approx(rough), "torch has no such table"


def test_types_spread_by_a_solver_lie_between_the_types(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_table(monkeypatch, SPEEDS)
    timed = Predictor(machine(), predictor.model)
    few, some, most = (timed.physics(Recipe.parse(f"mixed_precision(bits={b})"))["latency"] for b in (4.5, 5.7, 8.5))
    assert few == pytest.approx(timed.physics(Recipe.parse('gguf(type="iq4_nl")'))["latency"], rel=0.02)
    assert most == pytest.approx(timed.physics(Q8)["latency"], rel=0.02)
    assert some > most, "the types of five bits are slow here"


def test_a_limit_on_time_bounds_the_prediction(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    with_table(monkeypatch, SPEEDS)
    timed = Predictor(machine(), predictor.model)
    eight = timed.physics(Q8)["latency"]
    limited = timed.physics(Recipe(MixedPrecision(bits=5.7, time=1.0)))
    assert limited["latency"] == pytest.approx(eight)


def test_a_table_taken_in_noise_is_not_used(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    rough = predictor.physics(Q8)["latency"]
    with_table(monkeypatch, replace(SPEEDS, others=0.6))
    assert Predictor(machine(), predictor.model, prompt=100, output=50).physics(Q8)["latency"] == pytest.approx(rough)


def test_with_a_table_another_engine_teaches_no_speed(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_table(monkeypatch, SPEEDS)
    timed = Predictor(machine(), predictor.model, prompt=100, output=50)
    parent, q8, q4 = (timed.physics(r) for r in (Recipe(), Q8, Q4))
    base = trial(0, "parent", request=4 * parent["request"], energy=12 * parent["energy"])
    first = timed.after([base]).predict(Q8)
    assert first.value("request") == pytest.approx(q8["request"])
    assert first.value("energy") == pytest.approx(3 * q8["energy"], rel=0.03), "watts carry over, time does not"
    second = timed.after([base, trial(1, str(Q8), request=1.2 * q8["request"])]).predict(Q4)
    assert second.value("request") == pytest.approx(1.2 * q4["request"], rel=0.05)


def test_predicting_neither_measures_nor_loads_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from made_up import bare_model, machine\n"
        "from fivefold.recipe import Recipe; from fivefold.study.predictor import Predictor\n"
        "p = Predictor(machine(), bare_model(Path(sys.argv[2])))\n"
        "print(p.after([]).predict(Recipe.parse('gguf(type=\"q8_0\")')).value('latency'))\n"
        "assert not {'torch', 'transformers', 'xllamacpp', 'scipy'} & set(sys.modules)\n"
    )
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(here), str(tmp_path / "model")], capture_output=True, text=True,
        env={**os.environ, "FIVEFOLD_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0 and not list((tmp_path / "cache").rglob("*.json"))
