"""A run that was stopped goes on to the same model; its folder is its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tuning import RECIPE, Run, asked, checkpoints, heard, interrupted

from fivefold.artifact import Artifact
from fivefold.errors import Infeasible, StoreError
from fivefold.model import Model
from fivefold.study.train import train
from fivefold.testing.contract import sentence
from fivefold.testing.tiny import tiny_examples
from fivefold.training.checkpoint import STATE

pytestmark = pytest.mark.usefixtures("quick")


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", [RECIPE, "full(rate=0.003)"])
@pytest.mark.parametrize("at", [1, 6, 11])
def test_stopped_and_repeated_it_is_the_same_model(
    pupil: Model, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, at: int
) -> None:
    with checkpoints(monkeypatch):
        train(asked(pupil, lessons, tmp_path / "whole", recipe=recipe))
        interrupted(asked(pupil, lessons, tmp_path / "out", recipe=recipe), at)
        before = lines(tmp_path / "out")[-1]
        _, events = heard(asked(pupil, lessons, tmp_path / "out", recipe=recipe))
    assert events[0].resumed == at - 1 and len(events[0].forecasts) == 1
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    found = lines(tmp_path / "out")
    assert [line["step"] for line in found] == list(range(1, 13))
    assert [line["loss"] for line in found] == [line["loss"] for line in lines(tmp_path / "whole")]
    assert found[at - 1]["seconds"] > before["seconds"] and found[at - 1]["joules"] > before["joules"]
    cost = Artifact.open(tmp_path / "out" / "model").facts["made"]
    assert cost["seconds"]["value"] > found[-1]["seconds"] and cost["disk"]["value"] is None


def test_it_goes_on_with_the_plan_it_began_with(
    pupil: Model, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(pupil, lessons, tmp_path / "out", "memory<=4GB", recipe="")
    with checkpoints(monkeypatch):
        interrupted(request, 4)
        monkeypatch.setattr("fivefold.study.train.forecast", lambda *given: pytest.fail("it was forecast again"))
        done, events = heard(request)
    assert done.recipe == "lora" and events[0].resumed == 3 and events[0].chosen.plan.steps == 12


def test_what_lost_work_took_is_not_forgotten(
    pupil: Model, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(pupil, lessons, tmp_path / "out")
    with checkpoints(monkeypatch, 1000.0):  # none before the last step
        for at in (6, 2):
            interrupted(request, at)
        last = lines(tmp_path / "out")[-1]
        assert [line["step"] for line in lines(tmp_path / "out")] == [1, 2]
        done = train(request)
    assert last["seconds"] > 0 and done.cost.seconds.value > last["seconds"]
    assert done.cost.energy.value > last["joules"] and done.cost.memory.value >= last["memory"]
    assert done.cost.cpu_seconds.value is None and "not recorded" in done.cost.cpu_seconds.reason


def test_another_request_is_refused_by_name(
    pupil: Model, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with checkpoints(monkeypatch):
        interrupted(asked(pupil, lessons, tmp_path / "out", "memory<=4GB"), 3)
    other = tiny_examples(tmp_path / "other.jsonl", 100)
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir() if f.is_file()}
    for changed, name in (({"recipe": "lora"}, "recipe"), ({"steps": 13}, "steps"), ({"seed": 1}, "seed"),
                          ({"data": other}, "data"), ({"budget": "time<=1h"}, "budget")):
        given = {"model": pupil, "data": lessons, "out": tmp_path / "out", "budget": "memory<=4GB", **changed}
        with pytest.raises(StoreError, match=f"with another {name};") as caught:
            train(asked(**given))
        sentence(caught.value)
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir() if f.is_file()} == before
    with pytest.raises(Infeasible, match="allow it") as told:
        train(asked(pupil, lessons, tmp_path / "out", "memory<=10MB"))
    sentence(told.value)
    assert train(asked(pupil, lessons, tmp_path / "out", "memory<=8GB")).steps == 12


def test_a_folder_of_something_else_is_left_alone(pupil: Model, lessons: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="holds no training run") as caught:
        train(asked(pupil, lessons, tmp_path))
    sentence(caught.value)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "precious"
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(StoreError) as caught:
            train(asked(pupil, lessons, out))
        sentence(caught.value)


def test_a_finished_run_stays(finished_run: Run, pupil: Model, lessons: Path) -> None:
    out = finished_run[0].folder
    (out / STATE).write_bytes(b"left by a process killed at the very end")
    before = weights(out)
    with pytest.raises(StoreError, match="is finished") as caught:
        train(asked(pupil, lessons, out, "memory<=4GB", task="accuracy"))
    sentence(caught.value)
    assert weights(out) == before and not (out / STATE).exists()


def test_killed_while_it_was_judged(
    pupil: Model, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(pupil, lessons, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("fivefold.study.sealed.judge", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(request)
    (tmp_path / "out" / ".model.abc").mkdir()
    assert not (tmp_path / "out" / "model").exists()
    done, events = heard(request)
    assert events[0].resumed == 12 and done.steps == 12 and not list((tmp_path / "out").glob(".model*"))
    assert [line["step"] for line in lines(tmp_path / "out")] == list(range(1, 13))


def test_damaged_records_are_named(
    pupil: Model, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with checkpoints(monkeypatch):
        interrupted(asked(pupil, lessons, tmp_path / "out"), 3)
    whole = (tmp_path / "out" / "run.json").read_text()
    told = json.loads(whole)
    for damaged in ("{", "[]", '"text"', "{}", json.dumps({**told, "chosen": {}}), json.dumps({**told, "taken": 3})):
        (tmp_path / "out" / "run.json").write_text(damaged)
        with pytest.raises(StoreError, match=r"run.json is damaged") as caught:
            train(asked(pupil, lessons, tmp_path / "out"))
        sentence(caught.value)
    (tmp_path / "out" / "run.json").write_text(whole)
    with (tmp_path / "out" / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "lo')
    assert train(asked(pupil, lessons, tmp_path / "out")).steps == 12
    assert len(lines(tmp_path / "out")) == 12
