"""A whole study of a tiny model with real engines, and what of it is built once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up import machine
from scipy.stats import binomtest

from fivefold.artifact import Store
from fivefold.budget import Allowance, Budget
from fivefold.engines import open_session
from fivefold.errors import Misfit, UserError
from fivefold.model import Model
from fivefold.quantity import Measurement, Quantity
from fivefold.recipe import Recipe, catalogue
from fivefold.study.build import Builder, folder_bytes
from fivefold.study.optimize import optimize
from fivefold.study.picks import picks
from fivefold.study.plan import plan
from fivefold.study.study import Study
from fivefold.study.trial import Outcome
from fivefold.tasks import choice
from fivefold.testing import tiny_model
from fivefold.testing.tiny import TEXT
from fivefold.tokenizer import Tokenizer

TECHNIQUES = ("gguf", "threads")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "parent")


@pytest.fixture(scope="module")
def run(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Study]:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "requests.jsonl").write_text("\n".join(
        json.dumps({"prompt": p, "max_tokens": 8}) for p in ("How many does she sell in a day?", "Energy is")
    ))
    lines = (f"Sentence {i} of a text. {TEXT}" for i in range(150))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))

    def go(out: Path, **choices: object) -> Study:
        given = {
            "budget": Budget.parse("size<=0.5x"), "objectives": ("latency", "size", "kl"), "allowance": Allowance(),
            "workload": str(folder / "requests.jsonl"), "text": str(folder / "text.jsonl"), "trials": 3,
            "techniques": {name: catalogue()[name] for name in TECHNIQUES}, "machine": machine(), "rounds": 1,
        }
        return optimize(model, out, **{**given, **choices})

    return go


@pytest.fixture(scope="module")
def done(run: Callable[..., Study], tmp_path_factory: pytest.TempPathFactory) -> Study:
    return run(tmp_path_factory.mktemp("study"))


def test_the_parent_is_measured_in_torch_and_agrees_with_itself(done: Study) -> None:
    parent = done.trials[0]
    assert parent.outcome is Outcome.MEASURED and parent.artifact is None
    assert parent.value("agreement") == 1.0 and abs(parent.value("kl") or 0.0) < 1e-5
    assert parent.measurement.context["engine"]["engine"] == "torch"


def test_candidates_are_measured_in_the_engine_that_serves_them(done: Study) -> None:
    measured = [t for t in done.trials[1:] if t.outcome is Outcome.MEASURED]
    assert measured, [(t.recipe, t.outcome, t.sentence) for t in done.trials]
    for t in measured:
        assert t.measurement.context["engine"]["engine"] == "llama.cpp"
        assert (t.value("kl") or 0) > 0 and (t.value("latency") or 0) > 0
        assert t.made["seconds"].value and t.coverage
        assert t.artifact and (done.folder / "artifacts" / t.artifact / "manifest.json").is_file()
    assert all(not t.outcome.failed for t in done.trials), [t.sentence for t in done.trials]


def test_sizes_are_foreseen(done: Study) -> None:
    for t in done.trials[1:]:
        guess, truth = t.predicted.value("size"), t.value("size")
        if guess and truth:
            assert 0.5 < guess / truth < 1.1, "a tiny file is half header and tokenizer"


def test_the_seconds_are_accounted_for(done: Study) -> None:
    for t in done.trials:
        if t.outcome is Outcome.MEASURED:
            first = {"reference"} if t.recipe == "parent" else {"build", "screen"}
            assert {*first, "measure", "quality", "overhead"} <= set(t.spent)
            assert t.spent["energy.J"] > 0


def test_the_same_command_has_nothing_left_to_do(done: Study, run: Callable[..., Study]) -> None:
    before = [t.to_json() for t in done.trials]
    assert [t.to_json() for t in run(done.folder).trials] == before


def test_the_picks_were_measured_in_turn_with_the_parent(done: Study) -> None:
    chosen = picks(done.trials, done.goal)
    assert chosen
    for pick in chosen:
        paired = pick.trial.paired
        assert paired.context["rounds"] == 6 and paired.context["requests"] == 2 and not paired.context["sentence"]
        for metric in ("latency", "decode", "ttft", "energy", "money"):
            assert (paired.value(metric) or 0) > 0 and pick.against[metric] == paired[metric]
        assert paired["latency"].n == 6 and pick.trial.spent["in turn"] > 0
    assert not any(len(t.paired) for t in done.trials if t.number not in [p.trial.number for p in chosen])


def test_an_artifact_that_is_gone_is_told_and_the_study_stays(
    done: Study, run: Callable[..., Study], tmp_path: Path
) -> None:
    shutil.copytree(done.folder, tmp_path / "copy")
    copy = Study(tmp_path / "copy")
    with copy.store.writing() as store:
        store.put(*(t.but(paired=Measurement({})) for t in copy.trials))
    shutil.rmtree(copy.folder / "artifacts")
    again = run(copy.folder)
    paired = [p.trial.paired for p in picks(again.trials, again.goal) if p.trial.artifact]
    assert paired and all(m.context["outcome"] == "refused" and "is gone" in m.context["sentence"] for m in paired)
    assert [t.measurement.to_json() for t in again.trials] == [t.measurement.to_json() for t in done.trials]


QUESTIONS = [
    {"question": f"How many of {i}?", "choices": ["She sells sea shells.", "joules", f"{i} others"], "answer": i % 3}
    for i in range(14)
]


@pytest.fixture(scope="module")
def tasked(run: Callable[..., Study], tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    folder = tmp_path_factory.mktemp("tasked")
    for name, rows in (("first", QUESTIONS), ("second", QUESTIONS[:10:-1])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"objectives": ("size", "accuracy"), "budget": Budget.parse("accuracy>=0.01x")}
    return run(folder / "study", tasks=(str(folder / "first.jsonl"), str(folder / "second.jsonl")), items=12, trials=2,
               techniques={"gguf": catalogue()["gguf"]}, **given), folder


def test_trials_answer_the_tasks_in_their_engine_and_are_paired(
    model: Model, tasked: tuple[Study, Path]
) -> None:
    study, folder = tasked
    parent, child = study.trials[0], study.trials[1]
    assert child.outcome is Outcome.MEASURED, "an objective on a task lets a screened trial be measured"
    sets = [choice.load(folder / f"{name}.jsonl", 12) for name in ("first", "second")]
    right = []
    stored = Store(study.folder / "artifacts").get(child.artifact or "")
    assert stored is not None
    for one in (model, stored.model()):
        session = open_session(one)
        answers = [choice.answer(session, Tokenizer(one.tokenizer_file), s) for s in sets]
        session.close()
        right.append(np.concatenate([a.correct for a in answers]))
    assert len(right[0]) == 15
    for trial, hits in zip((parent, child), right, strict=True):
        q = trial.measurement["accuracy"]
        assert (q.value, q.n) == (hits.mean(), 15) and q.low is not None and q.low <= hits.mean() <= (q.high or 0)
    lost, won = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    p = binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert child.measurement.context["mcnemar_p"] == pytest.approx(p)
    assert parent.measurement.context["mcnemar_p"] == 1.0 and parent.value("label_loyalty") == 1.0
    assert {k: v["items"] for k, v in child.measurement.context["tasks"].items()} == {"first": 12, "second": 3}


def test_tasks_and_items_identify_the_study(tasked: tuple[Study, Path], run: Callable[..., Study]) -> None:
    study, folder = tasked
    assert study.meta["settings"]["task"].startswith("first (12 items, ")
    given = {"objectives": ("size", "accuracy"), "budget": Budget.parse("accuracy>=0.01x"), "trials": 2,
             "techniques": {"gguf": catalogue()["gguf"]}}
    for tasks, items in ((("first",), 12), (("first", "second"), 11)):
        paths = tuple(str(folder / f"{name}.jsonl") for name in tasks)
        with pytest.raises(UserError, match="was started with task"):
            run(study.folder, tasks=paths, items=items, **given)
    before = [t.to_json() for t in study.trials]
    paths = tuple(str(folder / f"{name}.jsonl") for name in ("first", "second"))
    assert [t.to_json() for t in run(study.folder, tasks=paths, items=12, **given).trials] == before


def test_a_task_metric_without_a_task_is_refused(run: Callable[..., Study], tmp_path: Path) -> None:
    for given in ({"budget": Budget.parse("accuracy>=0.9x")}, {"objectives": ("latency", "accuracy")}):
        with pytest.raises(UserError, match=r"accuracy is measured on a task and none was named; add --task"):
            run(tmp_path / "out", **given)
    assert not (tmp_path / "out" / "study.sqlite").exists()


def test_answers_that_are_lost_are_made_anew(
    tasked: tuple[Study, Path], run: Callable[..., Study], tmp_path: Path
) -> None:
    study, folder = tasked
    shutil.copytree(study.folder, tmp_path / "copy")
    before = json.loads((study.folder / "answers.json").read_text())
    (tmp_path / "copy" / "answers.json").unlink()
    run(tmp_path / "copy", tasks=tuple(str(folder / f"{n}.jsonl") for n in ("first", "second")), items=12, trials=2,
        techniques={"gguf": catalogue()["gguf"]}, objectives=("size", "accuracy"),
        budget=Budget.parse("accuracy>=0.01x"))
    after = json.loads((tmp_path / "copy" / "answers.json").read_text())
    assert [a["right"] for a in after] == [a["right"] for a in before]
    for a, b in zip(after, before, strict=True):
        assert np.allclose(np.concatenate(a["probabilities"]), np.concatenate(b["probabilities"]), atol=1e-3)


def test_another_command_in_the_same_folder_is_refused(done: Study, run: Callable[..., Study]) -> None:
    with pytest.raises(UserError, match=r"budget 'size<=0.5x'.*'size<=0.4x'"):
        run(done.folder, budget=Budget.parse("size<=0.4x"))


def test_a_plan_spends_nothing_and_says_what_is_left_out(model: Model, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"prompt": "a b c", "max_tokens": 8}')
    found = plan(model, budget=Budget.parse("size<=0.5x"), objectives=("latency",), allowance=Allowance(time=600.0),
                 workload=str(tmp_path / "r.jsonl"), machine=machine(),
                 techniques={name: catalogue()[name] for name in TECHNIQUES})
    assert set(found.techniques) == set(TECHNIQUES) and any("q6_k" in spelled for spelled in found.dropped)
    assert found.candidates and all(c.objection for c in found.candidates if c.size > 0.7 * 4 * 1.2e5)
    assert (found.trials.value or 0) > 0 and (found.time.value or 0) <= 600
    assert all(isinstance(q, Quantity) and q.method == "modelled" for q in (found.energy, found.disk, found.trial))


def builder(folder: Path, **choices: object) -> Builder:
    return Builder(folder, machine(), **choices)  # type: ignore[arg-type]


Q8 = 'gguf(type="q8_0", importance=False)'


def test_a_shared_beginning_is_built_once(bare: Model, tmp_path: Path) -> None:
    make = builder(tmp_path)
    parent, pruned = with_text(bare, tmp_path), "prune_depth(layers=1)"
    first = make.build(Recipe.parse(f"{pruned} + {Q8}"), parent)
    again = make.build(Recipe.parse(f"{pruned} + {Q8} + threads(count=1)"), parent)
    other = make.build(Recipe.parse(f'{pruned} + gguf(type="q4_0", importance=False)'), parent)
    assert set(first.steps) == {"step.prune_depth", "step.gguf", "step.export"}
    assert again.steps == {} and again.artifact is not None and first.artifact is not None
    assert again.artifact.key == first.artifact.key and again.model.run.threads == 1
    assert set(other.steps) == {"step.gguf", "step.export"}
    seconds = [b.made["seconds"].value or 0.0 for b in (first, again, other)]
    assert seconds[0] == seconds[1] and seconds[2] > other.steps["step.export"], "re-used steps still cost"


def test_an_interrupted_step_is_made_again(bare: Model, tmp_path: Path) -> None:
    make, recipe = builder(tmp_path), Recipe.parse(Q8)
    (tmp_path / "steps" / make.keys(recipe, bare)[0]).mkdir(parents=True)
    assert "step.gguf" in make.build(recipe, bare).steps


def test_the_key_is_everything_that_decides_the_result(bare: Model, tmp_path: Path) -> None:
    recipe = Recipe.parse(Q8)
    base = builder(tmp_path).keys(recipe, bare)[-1]
    other = with_text(bare, tmp_path)
    different = [
        builder(tmp_path, seed=1).keys(recipe, bare)[-1], builder(tmp_path).keys(recipe, other)[-1],
        builder(tmp_path).keys(Recipe.parse('gguf(type="q8_0")'), bare)[-1],
        builder(tmp_path).keys(recipe, bare.but(train=replace(bare.train, steps=5)))[-1],
    ]
    assert len({base, *different}) == 5
    assert builder(tmp_path / "elsewhere").keys(Recipe.parse(f"{Q8} + threads(count=2)"), bare)[-1] == base


def test_steps_are_removed_when_the_quota_is_full(bare: Model, tmp_path: Path) -> None:
    make = builder(tmp_path, quota=700_000)
    for n in (1, 2):
        make.build(Recipe.parse(f"prune_depth(layers={n}) + {Q8}"), with_text(bare, tmp_path))
    assert folder_bytes(tmp_path / "steps") <= 350_000


def test_a_misfit_is_refused_before_any_work(bare: Model, tmp_path: Path) -> None:
    with pytest.raises(Misfit):
        builder(tmp_path).build(Recipe.parse('gguf(type="q6_k")'), bare)
    assert not list(tmp_path.iterdir())


def with_text(model: Model, folder: Path) -> Model:
    text = folder / "text.txt"
    text.write_text(TEXT * 120)
    return model.but(calibration=text)
