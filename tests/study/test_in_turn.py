"""The last step: how much of it is affordable, that drift cancels in its ratios, and every way it can fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_up import machine, measured, trial

from fivefold.budget import Allowance, Budget
from fivefold.meters import interleaved
from fivefold.meters.money import Prices
from fivefold.model import Model
from fivefold.quantity import Measurement, Quantity
from fivefold.study import in_turn
from fivefold.study.in_turn import LEAST, MOST, PHASE, START, failed, spread, turn, unpaired
from fivefold.study.pareto import Goal
from fivefold.study.picks import against, ratios_by
from fivefold.study.policy import InTurn, Policy, Stop, spent_seconds
from fivefold.study.predictor import Predictor
from fivefold.study.sampler import SearchSpace, make
from fivefold.study.trial import Outcome, Trial

WORKER = '''
import json, sys
job = json.load(open(sys.argv[1]))
speeds, drift = json.load(open(job["model"]["name"])), job["workload"]["batch"]
mine = speeds[job["workload"]["name"]]
if mine is None:
    print(json.dumps({"error": "the engine gave up", "kind": "Crashed"})); sys.exit()
print(json.dumps({"ready": True}), flush=True)
turns = 0
def quantity(value, unit): return {"value": value, "unit": unit, "method": "modelled"}
for line in sys.stdin:
    ask = json.loads(line)
    if ask["do"] == "finish":
        found = {n: quantity(mine, u) for n, u in (("energy", "J/token"), ("money", "USD/Mtoken"))}
        found |= {n: {**quantity(mine, u), "method": "measured"} for n, u in (
            ("latency", "s/token"), ("decode", "token/s"), ("ttft", "s"), ("prefill", "token/s"))}
        print(json.dumps({"measurement": {"quantities": found, "context": {"date": "today"}}}), flush=True)
        break
    turns += 1
    slow = mine * turns ** 2
    values = {"latency": slow, "ttft": 3 * slow, "decode": 1 / slow}
    print(json.dumps({"round": turns, "others": 0.0, "disturbed": False, "values": values,
                      "energy": quantity(slow, "J/token")}), flush=True)
'''
"""A measuring process by a formula: its speed, times the square of how often it was asked (the machine's drift)."""

GOAL = Goal(("latency", "size"))


def timed(number: int, recipe: str, request: float, opening: float, **values: float) -> Trial:
    """A trial of 4 requests in 2 rounds, with what the measurement must have cost."""
    made = trial(number, recipe, latency=request, size=1e6 / (number + 1), memory=1e8, energy=1.0, **values)
    measurement = made.measurement.merged(measured({"request": request}))
    return made.but(
        measurement=Measurement(measurement.quantities, {"requests": 4, "batch": 1, "rounds_run": 2}),
        spent={"measure": opening + 8 * request, "quality": 1.0},
    )


@dataclass(frozen=True)
class Traffic:
    name: str
    requests: tuple[SimpleNamespace, ...] = (SimpleNamespace(prompt=[1], max_tokens=2),) * 2
    batch: int = 1


@pytest.fixture
def run(bare: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Measure models called by their recipe's speed with the formula's process."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(interleaved, "COMMAND", [sys.executable, str(tmp_path / "worker.py")])

    def go(speeds: Mapping[str, float | None], **limits: object) -> dict[int, Measurement]:
        (tmp_path / "speeds").write_text(json.dumps(speeds))
        model = bare.but(name=str(tmp_path / "speeds"))
        arms = {int(n): model.but(work=tmp_path / n) for n in speeds if n != "0"}
        return in_turn.measured(
            model, arms, lambda m: Traffic(m.work.name if m.work else "0"), rounds=6,
            machine=machine(), prices=Prices.load(), country="world", **limits,  # type: ignore[arg-type]
        )

    return go


def test_the_least_turn_is_what_opening_and_three_short_rounds_cost() -> None:
    arms = [timed(0, "parent", 2.0, 5.0), timed(1, "threads(count=1)", 0.5, 1.0)]
    least = turn(arms, 0.0)
    assert (least.requests, least.rounds) == (1, LEAST)
    assert least.expected == pytest.approx(START + 6.0 + LEAST * 2.5)


def test_more_seconds_buy_rounds_first_then_requests() -> None:
    arms = [timed(0, "parent", 2.0, 5.0), timed(1, "threads(count=1)", 0.5, 1.0)]
    fixed = START + 6.0
    found = [turn(arms, fixed + 2.5 * n) for n in (4.01, 6.01, 11.9, 12.01, 24.01, 1000)]
    assert [(t.requests, t.rounds) for t in found] == [(1, 4), (1, 6), (1, 6), (2, 6), (4, 6), (4, 6)]
    assert all(t.expected <= fixed + 2.5 * 24.01 for t in found)
    assert (turn(arms, float("inf")).requests, turn(arms, float("inf")).rounds) == (4, MOST)


def test_requests_are_spread_over_the_workload() -> None:
    assert spread("abcdefgh", 1) == ["a"] and spread("abcdefgh", 4) == list("aceg")
    assert spread("abc", 5) == list("abc")


def test_drift_cancels_in_the_ratio(run) -> None:  # type: ignore[no-untyped-def]
    found = run({"0": 2.0, "1": 0.5, "2": 4.0})
    assert {n: m.value("latency") for n, m in found.items()} == {1: 0.25, 2: 2.0}
    for m in found.values():
        assert (m["latency"].low, m["latency"].n, m["latency"].unit) == (m["latency"].high, 6, "x")
        assert m["energy"].method == "modelled" and m["latency"].method == "measured"
        assert m.value("money") == m.value("latency")
        assert m.context == {"outcome": "measured", "sentence": "", "rounds": 6, "requests": 2, "date": "today"}


def test_one_that_fails_is_named_and_the_others_are_measured(run) -> None:  # type: ignore[no-untyped-def]
    found = run({"0": 2.0, "1": None, "2": 4.0})
    assert found[2].value("latency") == 2.0
    assert not len(found[1]) and found[1].context == {"outcome": "crashed", "sentence": "trial 1: the engine gave up"}


def test_a_parent_that_fails_fails_all(run) -> None:  # type: ignore[no-untyped-def]
    found = run({"0": None, "1": 1.0, "2": 4.0})
    assert {m.context["outcome"] for m in found.values()} == {"crashed"}


def test_what_does_not_fit_together_is_taken_apart(run) -> None:  # type: ignore[no-untyped-def]
    found = run({"0": 2.0, "1": 1.0, "2": 4.0}, room=10.0, sizes={0: 5.0, 1: 4.0, 2: 6.0})
    assert found[1].value("latency") == 0.5
    assert found[2].context["outcome"] == "out of memory" and "do not fit" in found[2].context["sentence"]


def test_no_patience_leaves_two_rounds(run) -> None:  # type: ignore[no-untyped-def]
    assert run({"0": 2.0, "1": 1.0}, patience=0.0)[1].context["rounds"] == 2


def policy(bare: Model, seconds: float | None, share: float = 0.1) -> Policy:
    predictor = Predictor(machine(), bare)
    space = SearchSpace({}, {}, bare)
    return Policy(GOAL, space, make("random", GOAL), predictor, Allowance(time=seconds), turn_share=share)


def searched(**more: float) -> list[Trial]:
    return [timed(0, "parent", 2.0, 5.0), timed(1, "threads(count=1)", 0.5, 1.0, **more)]


def test_the_last_step_of_a_study_measures_the_picks_in_turn(bare: Model) -> None:
    step = policy(bare, None).next(searched())
    assert isinstance(step, InTurn)
    assert (step.parent.number, [t.number for t in step.trials]) == (0, [1])
    assert isinstance(policy(bare, None, share=0.0).next(searched()), Stop)


def test_it_is_done_once_also_where_it_failed(bare: Model) -> None:
    done = searched()
    for paired in (Measurement({}, {"outcome": "measured", "sentence": ""}), failed(Outcome.CRASHED, "so it did")):
        done[1] = done[1].but(paired=paired)
        assert isinstance(policy(bare, None).next(done), Stop) and not unpaired(done, GOAL)
    better = timed(2, "threads(count=2)", 0.1, 1.0).but(spent={})
    step = policy(bare, None).next([*done, better])
    assert isinstance(step, InTurn) and [t.number for t in step.trials] == [2], "only the new pick is due"


def test_only_the_parent_leaves_nothing_to_do(bare: Model) -> None:
    step = policy(bare, None).next(searched()[:1])
    assert isinstance(step, Stop) and not step.apart


def test_too_small_an_allowance_is_told(bare: Model) -> None:
    trials = searched()
    needed = turn(trials, 0.0).expected
    spent = spent_seconds(trials)
    short, enough = policy(bare, spent + needed - 1).next(trials), policy(bare, spent + needed + 1).next(trials)
    assert isinstance(enough, InTurn)
    assert isinstance(short, Stop) and short.apart == (
        f"measuring the picks in turn with the parent would take about {needed:.0f} s and {needed - 1:.0f} s are left"
    )


def test_the_share_is_kept_from_the_search_and_not_twice(bare: Model) -> None:
    trials, seconds = searched(), 1000.0
    p = policy(bare, seconds)
    assert p.left(trials[:1]) == seconds - spent_seconds(trials[:1]) - 0.1 * seconds
    before = p.left(trials)
    assert before == seconds - spent_seconds(trials) - 0.1 * seconds
    for cost in (1.0, 50.0, 150.0):
        paired = trials[1].but(paired=failed(Outcome.CRASHED, "x"), spent={**trials[1].spent, PHASE: cost})
        assert p.left([trials[0], paired]) <= before, "what the last step left over is not searched with"
    dear = policy(bare, 60.0)
    assert dear.kept(trials, trials[1:]) == 0.0, "a step that would cost more than twice the share is not waited for"


def test_ratios_in_turn_come_first_and_say_so() -> None:
    parent, child = trial(0, "parent", latency=2.0, size=4e6), trial(1, "threads(count=1)", latency=1.0, size=1e6)
    apart = against(child, parent)
    assert apart["latency"].value == 0.5 and "separate measurements" in ratios_by(child)
    pair = Measurement(
        {"latency": Quantity(value=0.4, unit="x", method="measured", n=6, low=0.3, high=0.5)},
        {"outcome": "measured", "sentence": "", "rounds": 6, "requests": 1},
    )
    together = against(child.but(paired=pair), parent)
    assert together["latency"].value == 0.4 and together["size"] == apart["size"]
    assert ratios_by(child.but(paired=pair)).endswith("in turn with the parent, median over 6 rounds of 1 request")
    why = ratios_by(child.but(paired=failed(Outcome.OUT_OF_MEMORY, "too big")))
    assert "separate" in why and "out of memory" in why and "too big" in why
    assert child.but(paired=pair).to_json() == Trial.from_json(child.but(paired=pair).to_json()).to_json()


def test_a_record_without_the_step_reads() -> None:
    data = trial(0, "parent", latency=2.0).to_json()
    del data["paired"]
    assert Trial.from_json(data).paired == Measurement({})


def test_a_screen_answers_no_task() -> None:
    goal = Goal(("latency", "accuracy"), Budget.parse("size<=1x, accuracy>=0.9x"))
    assert goal.of_screen() == Goal(("latency", "kl"), Budget.parse("size<=1x"))
    assert Goal(("kl", "accuracy")).of_screen().objectives == ("kl",)
