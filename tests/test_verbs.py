"""The whole walk on a tiny model: optimize, pick, explain, ship, compare, measure, plan, report."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import fivefold
from fivefold import display
from fivefold.errors import BudgetError, DataError, Departure, Infeasible, Misfit, RecipeError, StoreError, UserError
from fivefold.study.trial import Outcome
from fivefold.testing import tiny_model
from fivefold.verbs import catalogue, catalogue_page


def write_text(path: Path, paragraphs: int = 400) -> Path:
    words = ["energy", "memory", "token", "second", "byte", "joule", "model", "weight", "answer", "small", "large"]
    rng = random.Random(0)
    path.write_text("\n".join(" ".join(rng.choices(words, k=40)) + "." for _ in range(paragraphs)))
    return path


def write_workload(path: Path) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"How many joules, {i}?", "max_tokens": 8}) + "\n" for i in range(3)))
    return path


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A finished study of a tiny model, made once."""
    root = tmp_path_factory.mktemp("walk")
    tiny_model(root / "tiny", layers=2, width=64)
    text, traffic = write_text(root / "text.txt"), write_workload(root / "traffic.jsonl")
    choices = {"text": str(text), "workload": str(traffic)}
    fivefold.optimize(root / "tiny", out=root / "run", minimize="latency,size", allowance="75s", **choices)
    yield {"model": str(root / "tiny"), "run": str(root / "run"), **choices}


def test_the_study_measures_and_leaves_its_report(walk: dict[str, str]) -> None:
    study = fivefold.Study.open(walk["run"])
    measured = [t for t in study.trials if t.outcome is Outcome.MEASURED]
    assert study.parent is not None and len(measured) >= 2
    for name in ("report.html", "report.md", "trials.csv"):
        assert (Path(walk["run"]) / name).stat().st_size > 500
    for trial in measured:
        for metric in ("flops", "latency", "memory", "size", "energy", "money", "network", "agreement", "kl", "ece"):
            assert trial.measurement[metric].value is not None, f"{trial.recipe} has no {metric}"
    assert study.parent.value("kl") == pytest.approx(0.0, abs=1e-4)
    assert all("ece" not in t.screen and "agreement" in t.screen for t in measured if t.recipe != "parent")


def test_pick_answers_other_budgets_from_the_records(walk: dict[str, str]) -> None:
    smallest = fivefold.pick(walk["run"], by="size").trial
    sizes = [t.value("size") for t in fivefold.Study.open(walk["run"]).trials if t.value("size") is not None]
    assert smallest.value("size") == min(sizes)
    with pytest.raises(Infeasible, match="relax size"):
        fivefold.pick(walk["run"], budget="size<=1B")
    with pytest.raises(BudgetError, match="no metric"):
        fivefold.pick(walk["run"], by="beauty")
    with pytest.raises(StoreError, match="no study"):
        fivefold.pick(Path(walk["run"]) / "nothing")


def test_explain_is_a_function_of_the_records(walk: dict[str, str]) -> None:
    explained = fivefold.explain(walk["run"])
    assert {e.technique for e in explained.effects} <= set(fivefold.recipe.catalogue())
    assert fivefold.explain(walk["run"]) == explained


def test_other_settings_on_the_same_folder_are_refused(walk: dict[str, str]) -> None:
    with pytest.raises(UserError, match="budget"):
        fivefold.optimize(walk["model"], out=walk["run"], minimize="latency,size", budget="size<=1GB", allowance="1s",
                          text=walk["text"], workload=walk["workload"])


def test_ship_measures_the_copy_and_its_card_says_so(
    walk: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fivefold.study import ship as room

    # A tiny model answers in microseconds, so its times are noise; what is tested here is everything else.
    monkeypatch.setattr(room, "COSTS", dict.fromkeys(room.COSTS, 20.0))
    shipped = fivefold.ship(walk["run"], to=tmp_path / "shipped")
    copy = fivefold.Artifact.open(tmp_path / "shipped")
    copy.verify()
    assert copy.card is not None and copy.card["quantities"]["agreement"]["value"] is not None
    assert shipped.rows["kl"][2] == "same"
    model = fivefold.load(tmp_path / "shipped")
    assert model.path.exists()
    with pytest.raises(StoreError, match="already exists"):
        fivefold.ship(walk["run"], to=tmp_path / "shipped")


def test_ship_refuses_a_departure_and_leaves_nothing(
    walk: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fivefold.study import ship as room

    monkeypatch.setattr(room, "ANSWERS", {"agreement": -1.0})
    with pytest.raises(Departure, match="agreement"):
        fivefold.ship(walk["run"], to=tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


def test_ship_refuses_the_parent_and_unmeasured_trials(walk: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="parent"):
        fivefold.ship(walk["run"], to=tmp_path / "x", trial=0)
    with pytest.raises(UserError, match="not measured"):
        fivefold.ship(walk["run"], to=tmp_path / "x", trial=10**6)


def test_compare_a_model_with_itself_accepts_it(walk: dict[str, str]) -> None:
    compared = fivefold.compare(walk["model"], walk["model"], text=walk["text"], workload=walk["workload"], items=8)
    assert compared.decision.name == "ACCEPT" and compared.verdict.difference == 0
    assert compared.rows["size"][2].value == 1
    assert compared.rows["kl"][0].value is None and compared.rows["ece"][2].value == pytest.approx(1)
    assert sum(g.n for g in compared.groups.rows if g.by == "position") == 8 * 127
    assert "not clear" in compared.notes[0] and "worst_group_kl" in compared.rows


def test_measure_has_five_resources_and_quality(walk: dict[str, str]) -> None:
    measured = fivefold.measure(walk["model"], workload=walk["workload"], text=walk["text"], rounds=2,
                                recipe="threads(count=1)")
    for metric in ("flops", "latency", "memory", "energy", "money", "network", "perplexity"):
        assert measured.value(metric) is not None
    assert measured["energy"].method in ("measured", "modelled")
    with pytest.raises(Misfit, match="run-time techniques only"):
        fivefold.measure(walk["model"], recipe='gguf(type="q8_0")')


def test_compare_on_labels_shows_flips_groups_and_what_an_attack_leaves(
    walk: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(tmp_path / "other", layers=2, width=64, seed=7)
    rows = [{"question": f"Who sells {i} shells by the sea shore", "choices": ["she does", "the lazy dog"],
             "answer": i % 2} for i in range(24)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    compared = fivefold.compare(walk["model"], tmp_path / "other", task=str(tmp_path / "mine.jsonl"),
                                workload=walk["workload"], items=24, attack=6)
    accuracy, flips = compared.rows["accuracy"], compared.rows["flips"][1]
    assert flips.value >= abs(accuracy[1].value - accuracy[0].value) - 1e-9 and flips.n == 24
    for left in compared.rows["after_attack"][:2]:
        assert left.n == 6 and 0 <= left.value <= 1
    assert {g.by for g in compared.groups.rows} == {"length", "answer"}
    assert any(note.startswith("flips: right to wrong ") for note in compared.notes)
    assert any(note.startswith("accuracy after attack, B - A: ") for note in compared.notes)
    display.comparison(compared)
    shown = capsys.readouterr().out
    assert "she does" in shown and "right to wrong" in shown and "after_attack" in shown
    with pytest.raises(UserError, match="add --task sst2"):
        fivefold.compare(walk["model"], walk["model"], workload=walk["workload"], attack=2)


def test_measure_answers_tasks(walk: dict[str, str], tmp_path: Path) -> None:
    rows = [{"question": f"How many, {i}?", "choices": ["one", "a few of them"], "answer": i % 2} for i in range(12)]
    for name in ("mine", "yours"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows[:8] if name == "mine" else rows[8:])))
    tasks = [str(tmp_path / "mine.jsonl"), str(tmp_path / "yours.jsonl")]
    measured = fivefold.measure(walk["model"], workload=walk["workload"], rounds=1, quality=False, task=tasks,
                                attack=2)
    accuracy = measured["accuracy"]
    assert accuracy.n == 12 and accuracy.low is not None and accuracy.value is not None
    each = measured.context["tasks"]
    assert accuracy.value == pytest.approx((8 * each["mine"]["accuracy"] + 4 * each["yours"]["accuracy"]) / 12)
    assert "perplexity" not in measured and "mcnemar_p" not in measured.context and "flips" not in measured
    assert measured["after_attack"].n == 4 and measured["choice_ece"].n == 12
    with pytest.raises(UserError, match="add --task sst2"):
        fivefold.measure(walk["model"], workload=walk["workload"], attack=2)
    with pytest.raises(DataError, match="piqa"):
        fivefold.measure(walk["model"], workload=walk["workload"], task="piqaa")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.jsonl").write_text((tmp_path / "mine.jsonl").read_text())
    with pytest.raises(DataError, match="two tasks are called 'mine'"):
        fivefold.measure(walk["model"], workload=walk["workload"], task=[tasks[0], str(tmp_path / "b" / "mine.jsonl")])


def test_a_plan_counts_the_answering(walk: dict[str, str], tmp_path: Path) -> None:
    row = {"question": "How many joules does it take? " * 60, "choices": ["one", "two"], "answer": 0}
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps({**row, "question": f"{i} {row['question']}"})
                                                   for i in range(40)))
    given = {"text": walk["text"], "workload": walk["workload"], "allowance": "5min"}
    without = fivefold.plan(walk["model"], **given)
    with_task = fivefold.plan(walk["model"], **given, task=str(tmp_path / "mine.jsonl"), budget="accuracy>=0.9x")
    for name in ("baseline", "trial"):
        assert getattr(with_task, name).value > getattr(without, name).value


def test_plan_spends_nothing(walk: dict[str, str]) -> None:
    planned = fivefold.plan(walk["model"], text=walk["text"], workload=walk["workload"], allowance="5min")
    assert planned.trials.value and planned.energy.method == "modelled" and planned.candidates


def test_the_catalogue_page_is_the_generated_one() -> None:
    page = Path(__file__).parents[1] / "docs" / "catalogue.md"
    assert page.read_text(encoding="utf-8") == catalogue_page(catalogue()), (
        "run: fivefold catalogue --markdown > docs/catalogue.md"
    )
    with pytest.raises(RecipeError, match="did you mean threads"):
        catalogue("thread")
