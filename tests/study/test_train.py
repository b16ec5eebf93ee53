"""A run from the request to its artifact: what it leaves, what it goes on with, how it fails."""

from __future__ import annotations

import json
import math
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tuning import RECIPE, asked, checkpoints, heard, interrupted, without_rehearsal

import fivefold
from fivefold.artifact import Artifact
from fivefold.budget import TrainingBudget
from fivefold.errors import Departure, Infeasible, Misfit, NotFinite, OutOfMemory, StoreError, UserError
from fivefold.model import Model, TrainPlan, Trait, load
from fivefold.recipe import Recipe
from fivefold.study.request import Finished, Planned, Request
from fivefold.study.train import slower, train
from fivefold.study.watch import Progress
from fivefold.testing import tiny_model
from fivefold.testing.contract import sentence
from fivefold.testing.tiny import tiny_examples
from fivefold.training.checkpoint import STATE
from fivefold.weights import read_tensors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(tiny_model(tmp_path_factory.mktemp("tiny") / "model", layers=2, vocab=257, context=256).path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_examples(tmp_path_factory.mktemp("data") / "rows.jsonl", 160)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_rehearsal(monkeypatch)


@pytest.fixture(scope="module")
def done(tiny: Model, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, list[Any]]:
    with pytest.MonkeyPatch.context() as patch:
        without_rehearsal(patch)
        return heard(asked(tiny, data, tmp_path_factory.mktemp("run") / "out", "memory<=4GB", task="accuracy"))


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_it_tells_its_plan_each_step_and_what_it_costs(done: tuple[Finished, list[Any]], tiny: Model) -> None:
    finished, events = done
    assert isinstance(events[0], Planned) and str(events[0].chosen.recipe) == RECIPE and events[0].resumed == 0
    steps = [e for e in events if isinstance(e, Progress)]
    assert [s.step for s in steps] == list(range(1, 13)) and {s.steps for s in steps} == {12}
    assert all(s.tokens_per_second > 0 and s.memory > 100e6 and (s.joules or 0) > 0 and (s.usd or 0) > 0 for s in steps)
    assert steps[-1].left == 0 and steps[0].left > 0 and [s.score is not None for s in steps].count(True) == 5
    assert events[-1] == "measuring in the serving engine"
    cost = finished.cost.quantities()
    assert all(q.value is not None and q.value > 0 for name, q in cost.items() if name not in ("network", "disk"))
    assert steps[-1].seconds <= cost["seconds"].value < steps[-1].seconds + 30
    assert finished.steps == 12 and finished.numbers == trained_by_lora(tiny.blueprint, 4)


def trained_by_lora(b: Any, rank: int) -> int:
    """rank x (inputs + outputs) of every linear layer."""
    keys = b.kv_heads * b.head_dim
    pairs = [(b.width, b.width), (b.width, keys), (b.width, keys), (b.width, b.width), *[(b.width, b.ffn)] * 3]
    return int(b.layers * rank * sum(map(sum, pairs)))


def test_the_log_has_a_line_per_step(done: tuple[Finished, list[Any]]) -> None:
    finished, events = done
    steps = [e for e in events if isinstance(e, Progress)]
    found = lines(finished.folder)
    assert [(line["step"], line["loss"], line["memory"]) for line in found] == [
        (s.step, s.loss, s.memory) for s in steps]
    for name in ("seconds", "joules", "usd", "memory"):
        values = [line[name] for line in found]
        assert values == sorted(values)


def test_the_artifact_is_whole_and_a_model_like_a_fresh_one(done: tuple[Finished, list[Any]], tiny: Model) -> None:
    finished, _ = done
    artifact = Artifact.open(finished.folder / "model")
    artifact.verify()
    model = load(finished.folder / "model")
    assert (model.traits, model.blueprint) == (tiny.traits, tiny.blueprint)
    assert (model.train, model.origin) == (TrainPlan(), None)
    assert artifact.recipe == RECIPE and artifact.facts["made"]["energy"]["value"] > 0
    assert artifact.card is not None and set(artifact.card["quantities"]) == {"loss", "perplexity", "accuracy"}
    assert artifact.card["parent"]["loss"]["value"] > artifact.card["quantities"]["loss"]["value"]
    files = {str(f.relative_to(finished.folder)) for f in finished.folder.rglob("*") if f.is_file()}
    assert {f.partition("/")[0] for f in files} == {"model", "run.json", "log.jsonl", "exam.json", ".lock"}
    assert {"model/delta/adapter_config.json", "model/delta/adapter_model.safetensors", "model/README.md"} <= files
    assert "| accuracy |" in (finished.folder / "model" / "README.md").read_text()


def test_nothing_in_the_artifact_names_this_machine(done: tuple[Finished, list[Any]], tiny: Model, data: Path) -> None:
    for file in (done[0].folder / "model").rglob("*.[jmt][sdx][ot]*"):
        said = file.read_text(encoding="utf-8")
        assert str(tiny.path.parent) not in said and str(data.parent) not in said and str(Path.home()) not in said


def test_what_it_learned_is_measured_beside_the_parent(done: tuple[Finished, list[Any]]) -> None:
    judged = done[0].judged
    assert judged.card.value("loss") < 0.7 * judged.parent.value("loss")  # type: ignore[operator]
    assert judged.card.value("perplexity") == pytest.approx(math.exp(judged.card.value("loss")))  # type: ignore[arg-type]
    assert judged.verdict is not None and judged.verdict.n == 8 and judged.items.startswith("8 rows")
    assert done[0].before > done[0].after


def test_measure_compare_and_serve_take_it(
    done: tuple[Finished, list[Any]], tiny: Model, tmp_path: Path
) -> None:
    from fivefold.engines import open_session

    traffic, text = tmp_path / "traffic.jsonl", tmp_path / "text.txt"
    traffic.write_text(json.dumps({"prompt": "She sells", "max_tokens": 4}) + "\n")
    text.write_text("She sells a good fox. " * 400)
    made = str(done[0].folder / "model")
    measured = fivefold.measure(made, workload=str(traffic), rounds=1, quality=False)
    assert measured.value("latency") and measured.value("memory")
    compared = fivefold.compare(str(tiny.path), made, workload=str(traffic), text=str(text), items=8)
    assert compared.rows["size"][2].value == 1
    session = open_session(load(made))
    try:
        assert len(list(session.generate([1, 2, 3], 4))) == 4
    finally:
        session.close()


def test_it_can_be_trained_again(done: tuple[Finished, list[Any]], data: Path, tmp_path: Path) -> None:
    again = train(asked(load(done[0].folder / "model"), data, tmp_path / "out", recipe="full(rate=0.001)"))
    assert again.before == pytest.approx(done[0].after, rel=0.05) and again.after <= again.before
    assert Artifact.open(tmp_path / "out" / "model").facts["parent"]["name"] == "model"


def test_it_can_be_optimized(done: tuple[Finished, list[Any]], tmp_path: Path) -> None:
    from fivefold.budget import Allowance, Budget
    from fivefold.recipe import catalogue
    from fivefold.study.optimize import optimize
    from fivefold.study.trial import Outcome

    traffic, text = tmp_path / "traffic.jsonl", tmp_path / "text.txt"
    traffic.write_text(json.dumps({"prompt": "She sells", "max_tokens": 4}) + "\n")
    text.write_text("\n".join(f"She sells a good fox and a bad one, {i} of them." for i in range(900)))
    study = optimize(
        load(done[0].folder / "model"), tmp_path / "study", budget=Budget(), objectives=("latency", "size"), rounds=2,
        allowance=Allowance(), trials=2, techniques={"gguf": catalogue()["gguf"]}, text=str(text),
        workload=str(traffic),
    )
    assert [t.outcome for t in study.trials] == [Outcome.MEASURED] * 2 and "gguf" in study.trials[1].recipe


@pytest.fixture(scope="module")
def prefixed(tiny: Model, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    with pytest.MonkeyPatch.context() as patch:
        without_rehearsal(patch)
        return train(asked(tiny, data, tmp_path_factory.mktemp("prefix") / "out", recipe="prefix(tokens=4)"))


def test_an_adapter_beside_the_weights_is_a_trait_that_is_missing(prefixed: Finished, tiny: Model) -> None:
    model = load(prefixed.folder / "model")
    assert model.traits == tiny.traits - {Trait.PLAIN_GRAPH} and (model.path / "adapter").is_dir()
    assert model.blueprint.context == tiny.blueprint.context - 4
    with pytest.raises(Misfit, match="no adapter beside the weights") as caught:
        Recipe.parse('gguf(type="q8_0")').check(model)
    sentence(caught.value)
    Recipe.parse("threads(count=1)").check(model)


def test_a_model_with_an_adapter_beside_it_is_not_trained_again(
    prefixed: Finished, data: Path, tmp_path: Path
) -> None:
    for recipe in (RECIPE, ""):
        with pytest.raises(UserError, match="adapter beside its weights") as caught:
            train(asked(load(prefixed.folder / "model"), data, tmp_path / "out", recipe=recipe))
        sentence(caught.value)


@pytest.mark.parametrize("which", ["done", "prefixed"])
def test_ship_asks_the_copy_the_same(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    found = request.getfixturevalue(which)
    run = (found[0] if which == "done" else found).folder
    shipped = fivefold.ship(run, to=tmp_path / "shipped")
    copy = Artifact.open(tmp_path / "shipped")
    copy.verify()
    recorded = Artifact.open(run / "model").card
    assert copy.card is not None and recorded is not None
    assert copy.card["quantities"]["loss"]["value"] == pytest.approx(recorded["quantities"]["loss"]["value"], abs=1e-5)
    assert {name for name, row in shipped.rows.items() if row[2] == "same"} == set(shipped.rows) - {"perplexity"}
    assert (tmp_path / "shipped" / "model.safetensors").read_bytes() == weights(run)
    assert load(tmp_path / "shipped").traits == load(run / "model").traits
    with pytest.raises(StoreError, match="already exists"):
        fivefold.ship(run, to=tmp_path / "shipped")
    with pytest.raises(UserError, match="one model"):
        fivefold.ship(run, to=tmp_path / "other", trial=1)


def test_ship_refuses_a_copy_that_answers_otherwise(
    done: tuple[Finished, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(done[0].folder, run)
    told = json.loads((run / "exam.json").read_text())
    told["rows"] = told["rows"][:3]
    (run / "exam.json").write_text(json.dumps(told))
    with pytest.raises(Departure, match="departs from the run's model in loss") as caught:
        fivefold.ship(run, to=tmp_path / "shipped")
    sentence(caught.value)
    assert not (tmp_path / "shipped").exists()
    (run / "exam.json").unlink()
    with pytest.raises(StoreError, match=r"exam.json is missing") as caught:
        fivefold.ship(run, to=tmp_path / "shipped")
    flip = bytearray(weights(run))
    flip[len(flip) // 2] ^= 1
    (run / "model" / "model.safetensors").write_bytes(bytes(flip))
    (run / "exam.json").write_text(json.dumps(told))
    with pytest.raises(StoreError, match="changed after the artifact was made"):
        fivefold.ship(run, to=tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


@pytest.mark.parametrize("recipe", [RECIPE, "full(rate=0.003)"])
@pytest.mark.parametrize("at", [1, 6, 11])
def test_stopped_and_repeated_it_is_the_same_model(
    tiny: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, at: int
) -> None:
    with checkpoints(monkeypatch):
        train(asked(tiny, data, tmp_path / "whole", recipe=recipe))
        interrupted(asked(tiny, data, tmp_path / "out", recipe=recipe), at)
        before = lines(tmp_path / "out")[-1]
        _, events = heard(asked(tiny, data, tmp_path / "out", recipe=recipe))
    assert events[0].resumed == at - 1 and len(events[0].forecasts) == 1
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    found = lines(tmp_path / "out")
    assert [line["step"] for line in found] == list(range(1, 13))
    assert [line["loss"] for line in found] == [line["loss"] for line in lines(tmp_path / "whole")]
    assert found[at - 1]["seconds"] > before["seconds"] and found[at - 1]["joules"] > before["joules"]
    cost = Artifact.open(tmp_path / "out" / "model").facts["made"]
    assert cost["seconds"]["value"] > found[-1]["seconds"] and cost["disk"]["value"] is None


def test_it_goes_on_with_the_plan_it_began_with(
    tiny: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(tiny, data, tmp_path / "out", "memory<=4GB", recipe="")
    with checkpoints(monkeypatch):
        interrupted(request, 4)
        monkeypatch.setattr("fivefold.study.train.forecast", lambda *given: pytest.fail("it was forecast again"))
        done, events = heard(request)
    assert done.recipe == "lora" and events[0].resumed == 3 and events[0].chosen.plan.steps == 12


def test_what_lost_work_took_is_not_forgotten(
    tiny: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(tiny, data, tmp_path / "out")
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
    tiny: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with checkpoints(monkeypatch):
        interrupted(asked(tiny, data, tmp_path / "out", "memory<=4GB"), 3)
    other = tiny_examples(tmp_path / "other.jsonl", 100)
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir() if f.is_file()}
    for changed, name in (({"recipe": "lora"}, "recipe"), ({"steps": 13}, "steps"), ({"seed": 1}, "seed"),
                          ({"data": other}, "data"), ({"budget": "time<=1h"}, "budget")):
        given = {"model": tiny, "data": data, "out": tmp_path / "out", "budget": "memory<=4GB", **changed}
        with pytest.raises(StoreError, match=f"with another {name};") as caught:
            train(asked(**given))
        sentence(caught.value)
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir() if f.is_file()} == before
    with pytest.raises(Infeasible, match="allow it") as told:
        train(asked(tiny, data, tmp_path / "out", "memory<=10MB"))
    sentence(told.value)
    assert train(asked(tiny, data, tmp_path / "out", "memory<=8GB")).steps == 12


def test_a_folder_of_something_else_is_left_alone(tiny: Model, data: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="holds no training run") as caught:
        train(asked(tiny, data, tmp_path))
    sentence(caught.value)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "precious"
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(StoreError) as caught:
            train(asked(tiny, data, out))
        sentence(caught.value)


def test_a_finished_run_stays(done: tuple[Finished, list[Any]], tiny: Model, data: Path) -> None:
    out = done[0].folder
    (out / STATE).write_bytes(b"left by a process killed at the very end")
    before = weights(out)
    with pytest.raises(StoreError, match="is finished") as caught:
        train(asked(tiny, data, out, "memory<=4GB", task="accuracy"))
    sentence(caught.value)
    assert weights(out) == before and not (out / STATE).exists()


def test_killed_while_it_was_judged(
    tiny: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(tiny, data, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("fivefold.study.sealed.judge", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(request)
    (tmp_path / "out" / ".model.abc").mkdir()
    assert not (tmp_path / "out" / "model").exists()
    done, events = heard(request)
    assert events[0].resumed == 12 and done.steps == 12 and not list((tmp_path / "out").glob(".model*"))
    assert [line["step"] for line in lines(tmp_path / "out")] == list(range(1, 13))


def test_damaged_records_are_named(tiny: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with checkpoints(monkeypatch):
        interrupted(asked(tiny, data, tmp_path / "out"), 3)
    whole = (tmp_path / "out" / "run.json").read_text()
    told = json.loads(whole)
    for damaged in ("{", "[]", '"text"', "{}", json.dumps({**told, "chosen": {}}), json.dumps({**told, "taken": 3})):
        (tmp_path / "out" / "run.json").write_text(damaged)
        with pytest.raises(StoreError, match=r"run.json is damaged") as caught:
            train(asked(tiny, data, tmp_path / "out"))
        sentence(caught.value)
    (tmp_path / "out" / "run.json").write_text(whole)
    with (tmp_path / "out" / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "lo')
    assert train(asked(tiny, data, tmp_path / "out")).steps == 12
    assert len(lines(tmp_path / "out")) == 12


def test_memory_that_is_exceeded_stops_with_a_sentence_and_more_of_it_goes_on(
    tiny: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_rehearsal(monkeypatch, held=1e6)
    with checkpoints(monkeypatch), pytest.raises(OutOfMemory, match="100 MB are allowed") as caught:
        train(asked(tiny, data, tmp_path / "out", "memory<=100MB"))
    assert "were forecast" in sentence(caught.value) and str(tmp_path) not in str(caught.value)
    assert train(asked(tiny, data, tmp_path / "out", "memory<=8GB")).steps == 12


def test_an_allocation_that_fails_is_a_sentence(
    tiny: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    for error in (MemoryError(), RuntimeError(said)):
        def fail(*given: Any, error: Exception = error, **named: Any) -> None:
            raise error

        monkeypatch.setattr("fivefold.training.run.prepared", fail)
        with pytest.raises(OutOfMemory, match="no memory left") as caught:
            train(asked(tiny, data, tmp_path / "out"))
        sentence(caught.value)
    monkeypatch.setattr("fivefold.training.run.prepared", lambda *given: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        train(asked(tiny, data, tmp_path / "out"))


@contextmanager
def broken_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> Iterator[None]:
    """The loss is no number from then on."""
    from fivefold.training import run

    real = run.loss_of

    def loss_of(*given: Any) -> Any:
        loss, left = real(*given), [calls]

        def broken(batch: Any) -> Any:
            left[0] -= 1
            return loss(batch) * (1.0 if left[0] >= 0 else math.nan)

        return broken

    with monkeypatch.context() as patch:
        patch.setattr(run, "loss_of", loss_of)
        yield


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint_and_says_what_to_try(
    tiny: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(tiny, data, tmp_path / "out")
    with checkpoints(monkeypatch), broken_after(monkeypatch, 6), pytest.raises(NotFinite) as caught:
        train(request)
    said = sentence(caught.value)
    assert "became nan at step" in said and "'lora(rank=4, rate=0.001)'" in said and "keeps the last good" in said
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "out"))
    assert not (tmp_path / "out" / "model").exists()
    with checkpoints(monkeypatch):
        done, events = heard(request)
    assert events[0].resumed > 0 and done.steps == 12


def test_a_model_that_is_no_number_itself_is_told_apart(
    tiny: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for calls, out in ((0, "one"), (1, "two")):
        with broken_after(monkeypatch, calls), pytest.raises(NotFinite, match="as it was given") as caught:
            train(asked(tiny, data, tmp_path / out))
        assert "check its weights" in sentence(caught.value)


def test_a_tenth_of_the_rate_is_in_the_technique_that_sets_it(tiny: Model, data: Path) -> None:
    from tuning import around

    from fivefold.study.forecast import forecast

    for recipe, wanted in (("lora", "lora(rate=5e-05)"), ("full(rate=0.02)", "full(rate=0.002)"),
                           ("full + adamw8bit", "full(rate=5e-06) + adamw8bit"),
                           ("mezo", "mezo(rate=1e-07)"), ("checkpoint_activations",
                                                          "full(rate=5e-06) + checkpoint_activations")):
        request = asked(tiny, data, Path("nowhere"), recipe=recipe)
        found = forecast(Recipe.parse(recipe), around(request))
        assert slower(around(request).model, found) == wanted


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [600, 20_000])
def test_a_disk_that_fills_up(
    tiny: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    request = asked(tiny, data, tmp_path / "out")
    with checkpoints(monkeypatch):
        train(asked(tiny, data, tmp_path / "whole"))
        interrupted(request, 6)
        before = (tmp_path / "out" / STATE).read_bytes()
        with no_file_above(size), pytest.raises(StoreError, match="free space") as caught:
            train(request)
        sentence(caught.value)
        assert (tmp_path / "out" / STATE).read_bytes() == before
        assert not list((tmp_path / "out").rglob("*.partial"))
        train(request)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_disk_that_fills_up_at_the_end(
    tiny: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fivefold.study import sealed

    request, judge = asked(tiny, data, tmp_path / "out"), sealed.judge
    with no_file_above(1 << 40):
        def full(*given: Any) -> Any:
            found = judge(*given)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return found

        monkeypatch.setattr(sealed, "judge", full)
        with pytest.raises(StoreError, match="free space"):
            train(request)
    monkeypatch.setattr(sealed, "judge", judge)
    assert not (tmp_path / "out" / "model").exists()
    assert heard(request)[1][0].resumed == 12


@pytest.mark.parametrize(("budget", "name"), [("energy<=30J", "energy"), ("money<=$0.0001", "money"),
                                              ("time<=4s", "time")])
def test_a_limit_that_is_used_up_ends_the_run_with_what_it_has(
    tiny: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str, name: str
) -> None:
    from fivefold.study import watch

    monkeypatch.setattr(watch.Watch, "enough", enough_after(3, watch.Watch.enough))
    limit = TrainingBudget.parse(budget)
    done = train(Request(model=tiny, data=data, out=tmp_path / "out", budget=limit, recipe=RECIPE,
                         tokens_per_step=256, epochs=3.0))
    assert done.stopped.startswith(f"the {name} of") and done.steps > 0 and done.after <= done.before
    assert (tmp_path / "out" / "model" / "card.json").is_file()


def enough_after(steps: int, real: Any) -> Any:
    """The limits as if each step took 100 s."""
    from fivefold.quantity import Quantity

    def enough(self: Any) -> str:
        count = self.__dict__.setdefault("count", 0)
        self.count = count + 1
        taken = self.window.so_far()
        if count >= steps:
            grown = {n: Quantity(value=1e9, unit=q.unit, method="measured") for n, q in taken.quantities().items()}
            self.window = type("Window", (), {"so_far": lambda s: type(taken)(**grown)})()
        return str(real(self))

    return enough


@pytest.mark.parametrize(("changes", "needle"), [
    ({"epochs": math.nan}, "epochs is nan"), ({"epochs": math.inf}, "epochs is inf"), ({"epochs": -1.0}, "epochs"),
    ({"steps": -1}, "steps is -1"), ({"tokens_per_step": 1}, "tokens per step"), ({"items": 1}, "items"),
    ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"), ({"patience": -1}, "patience"),
])
def test_numbers_that_make_no_sense(tiny: Model, data: Path, changes: dict[str, Any], needle: str) -> None:
    with pytest.raises(UserError, match=needle) as caught:
        asked(tiny, data, Path("nowhere"), **changes)
    sentence(caught.value)


def test_half_precision_weights_are_trained_and_served(tiny: Model, data: Path, tmp_path: Path) -> None:
    import torch

    from fivefold.weights import write_safetensors

    folder = tmp_path / "half"
    shutil.copytree(tiny.path, folder)
    halves = {name: torch.from_numpy(t.numpy()).bfloat16() for name, t in read_tensors(tiny.path)}
    write_safetensors(folder / "model.safetensors", halves)
    done = train(asked(load(folder), data, tmp_path / "out"))
    assert done.after < done.before and done.judged.card.value("loss") == pytest.approx(done.after, rel=0.1)
