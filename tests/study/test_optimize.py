"""A whole study of a tiny model with real engines, and what of it is built once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import machine

from fivefold.budget import Allowance, Budget
from fivefold.errors import Misfit, UserError
from fivefold.model import Model
from fivefold.quantity import Quantity
from fivefold.recipe import Recipe, catalogue
from fivefold.study.build import Builder, folder_bytes
from fivefold.study.optimize import optimize
from fivefold.study.plan import plan
from fivefold.study.study import Study
from fivefold.study.trial import Outcome
from fivefold.testing import tiny_model
from fivefold.testing.tiny import TEXT

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
