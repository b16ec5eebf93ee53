"""A run from the request to its artifact: what it tells, what it leaves, what can be done with that."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from tuning import RECIPE, Run, asked

import fivefold
from fivefold.artifact import Artifact
from fivefold.errors import UserError
from fivefold.model import Model, TrainPlan, load
from fivefold.study.request import Planned
from fivefold.study.train import train
from fivefold.study.watch import Progress
from fivefold.testing.contract import sentence
from fivefold.weights import read_tensors

pytestmark = pytest.mark.usefixtures("quick")


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_it_tells_its_plan_each_step_and_what_it_costs(finished_run: Run, pupil: Model) -> None:
    finished, events = finished_run
    assert isinstance(events[0], Planned) and str(events[0].chosen.recipe) == RECIPE and events[0].resumed == 0
    steps = [e for e in events if isinstance(e, Progress)]
    assert [s.step for s in steps] == list(range(1, 13)) and {s.steps for s in steps} == {12}
    assert all(s.tokens_per_second > 0 and s.memory > 100e6 and (s.joules or 0) > 0 and (s.usd or 0) > 0 for s in steps)
    assert steps[-1].left == 0 and steps[0].left > 0 and [s.score is not None for s in steps].count(True) == 5
    assert events[-1] == "measuring in the serving engine"
    cost = finished.cost.quantities()
    assert all(q.value is not None and q.value > 0 for name, q in cost.items() if name not in ("network", "disk"))
    assert steps[-1].seconds <= cost["seconds"].value < steps[-1].seconds + 30
    assert finished.steps == 12 and finished.numbers == trained_by_lora(pupil.blueprint, 4)


def trained_by_lora(b: Any, rank: int) -> int:
    """rank x (inputs + outputs) of every linear layer."""
    keys = b.kv_heads * b.head_dim
    pairs = [(b.width, b.width), (b.width, keys), (b.width, keys), (b.width, b.width), *[(b.width, b.ffn)] * 3]
    return int(b.layers * rank * sum(map(sum, pairs)))


def test_the_log_has_a_line_per_step(finished_run: Run) -> None:
    finished, events = finished_run
    steps = [e for e in events if isinstance(e, Progress)]
    found = lines(finished.folder)
    assert [(line["step"], line["loss"], line["memory"]) for line in found] == [
        (s.step, s.loss, s.memory) for s in steps]
    for name in ("seconds", "joules", "usd", "memory"):
        values = [line[name] for line in found]
        assert values == sorted(values)


def test_the_artifact_is_whole_and_a_model_like_a_fresh_one(finished_run: Run, pupil: Model) -> None:
    finished = finished_run[0]
    artifact = Artifact.open(finished.folder / "model")
    artifact.verify()
    model = load(finished.folder / "model")
    assert (model.traits, model.blueprint) == (pupil.traits, pupil.blueprint)
    assert (model.train, model.origin) == (TrainPlan(), None)
    assert artifact.recipe == RECIPE and artifact.facts["made"]["energy"]["value"] > 0
    assert artifact.card is not None and set(artifact.card["quantities"]) == {"loss", "perplexity", "accuracy"}
    assert artifact.card["parent"]["loss"]["value"] > artifact.card["quantities"]["loss"]["value"]
    files = {str(f.relative_to(finished.folder)) for f in finished.folder.rglob("*") if f.is_file()}
    assert {f.partition("/")[0] for f in files} == {"model", "run.json", "log.jsonl", "exam.json", ".lock"}
    assert {"model/delta/adapter_config.json", "model/delta/adapter_model.safetensors", "model/README.md"} <= files
    assert "| accuracy |" in (finished.folder / "model" / "README.md").read_text()


def test_nothing_in_the_artifact_names_this_machine(finished_run: Run, pupil: Model, lessons: Path) -> None:
    for file in (finished_run[0].folder / "model").rglob("*.[jmt][sdx][ot]*"):
        said = file.read_text(encoding="utf-8")
        assert str(pupil.path.parent) not in said and str(lessons.parent) not in said and str(Path.home()) not in said


def test_what_it_learned_is_measured_beside_the_parent(finished_run: Run) -> None:
    judged = finished_run[0].judged
    assert judged.card.value("loss") < 0.7 * judged.parent.value("loss")  # type: ignore[operator]
    assert judged.card.value("perplexity") == pytest.approx(math.exp(judged.card.value("loss")))  # type: ignore[arg-type]
    assert judged.verdict is not None and judged.verdict.n == 8 and judged.items == "8 rows"
    assert finished_run[0].before > finished_run[0].after


def test_measure_compare_and_serve_take_it(
    finished_run: Run, pupil: Model, tmp_path: Path
) -> None:
    from fivefold.engines import open_session

    traffic, text = tmp_path / "traffic.jsonl", tmp_path / "text.txt"
    traffic.write_text(json.dumps({"prompt": "She sells", "max_tokens": 4}) + "\n")
    text.write_text("She sells a good fox. " * 400)
    made = str(finished_run[0].folder / "model")
    measured = fivefold.measure(made, workload=str(traffic), rounds=1, quality=False)
    assert measured.value("latency") and measured.value("memory")
    compared = fivefold.compare(str(pupil.path), made, workload=str(traffic), text=str(text), items=8)
    assert compared.rows["size"][2].value == 1
    session = open_session(load(made))
    try:
        assert len(list(session.generate([1, 2, 3], 4))) == 4
    finally:
        session.close()


def test_it_can_be_trained_again(finished_run: Run, lessons: Path, tmp_path: Path) -> None:
    again = train(asked(load(finished_run[0].folder / "model"), lessons, tmp_path / "out", recipe="full(rate=0.001)"))
    assert again.before == pytest.approx(finished_run[0].after, rel=0.05) and again.after <= again.before
    assert Artifact.open(tmp_path / "out" / "model").facts["parent"]["name"] == "model"


def test_it_can_be_optimized(finished_run: Run, tmp_path: Path) -> None:
    from fivefold.budget import Allowance, Budget
    from fivefold.recipe import catalogue
    from fivefold.study.optimize import optimize
    from fivefold.study.trial import Outcome

    traffic, text = tmp_path / "traffic.jsonl", tmp_path / "text.txt"
    traffic.write_text(json.dumps({"prompt": "She sells", "max_tokens": 4}) + "\n")
    text.write_text("\n".join(f"She sells a good fox and a bad one, {i} of them." for i in range(900)))
    study = optimize(
        load(finished_run[0].folder / "model"), tmp_path / "study", budget=Budget(), objectives=("latency", "size"),
        rounds=2, allowance=Allowance(), trials=2, techniques={"gguf": catalogue()["gguf"]}, text=str(text),
        workload=str(traffic),
    )
    assert [t.outcome for t in study.trials] == [Outcome.MEASURED] * 2 and "gguf" in study.trials[1].recipe


def test_half_precision_weights_are_trained_and_served(pupil: Model, lessons: Path, tmp_path: Path) -> None:
    import torch

    from fivefold.weights import write_safetensors

    folder = tmp_path / "half"
    shutil.copytree(pupil.path, folder)
    halves = {name: torch.from_numpy(t.numpy()).bfloat16() for name, t in read_tensors(pupil.path)}
    write_safetensors(folder / "model.safetensors", halves)
    done = train(asked(load(folder), lessons, tmp_path / "out"))
    assert done.after < done.before and done.judged.card.value("loss") == pytest.approx(done.after, rel=0.1)
@pytest.mark.parametrize(("changes", "needle"), [
    ({"epochs": math.nan}, "epochs is nan"), ({"epochs": math.inf}, "epochs is inf"), ({"epochs": -1.0}, "epochs"),
    ({"steps": -1}, "steps is -1"), ({"tokens_per_step": 1}, "tokens per step"), ({"items": 1}, "items"),
    ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"), ({"patience": -1}, "patience"),
])
def test_numbers_that_make_no_sense(pupil: Model, lessons: Path, changes: dict[str, Any], needle: str) -> None:
    with pytest.raises(UserError, match=needle) as caught:
        asked(pupil, lessons, Path("nowhere"), **changes)
    sentence(caught.value)
