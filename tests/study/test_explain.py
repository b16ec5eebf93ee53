"""Effects that were put into made-up trials come out again; what cannot be known is missing with its reason."""

from __future__ import annotations

import math

import pytest
from made_up import made_up_table, measured, trial
from scipy.stats import spearmanr

from fivefold.budget import Budget
from fivefold.quantity import Quantity
from fivefold.study.explain import Effect, explain, rank_correlation
from fivefold.study.feasible import infeasible, misses, relaxation
from fivefold.study.pareto import values_of
from fivefold.study.trial import Outcome, Trial


def effect(effects: tuple[Effect, ...], technique: str, metric: str) -> Effect:
    return next(e for e in effects if (e.technique, e.metric) == (technique, metric))


def test_paired_effects_are_ratios_of_pairs() -> None:
    trials = [
        trial(0, "parent", latency=8.0), trial(1, "threads(count=2)", latency=4.0),
        trial(2, 'gguf(type="q8_0")', latency=2.0), trial(3, 'gguf(type="q8_0") + threads(count=2)', latency=1.0),
    ]
    found = explain(trials).effects
    threads = effect(found, "threads", "latency")
    assert (threads.method, threads.n, threads.ratio) == ("paired", 2, pytest.approx(0.5))
    assert threads.low is not None and threads.low == threads.high == pytest.approx(-1.0)


def test_one_pair_takes_the_interval_of_its_measurements() -> None:
    trials = [
        trial(0, "parent").but(measurement=measured({"latency": 8.0}, spread=0.1)),
        trial(1, "threads(count=2)").but(measurement=measured({"latency": 4.0}, spread=0.1)),
    ]
    found = effect(explain(trials).effects, "threads", "latency")
    assert found.low == pytest.approx(math.log2(3.6 / 8.8)) and found.high == pytest.approx(math.log2(4.4 / 7.2))


def test_without_pairs_a_regression_recovers_additive_effects() -> None:
    effects = {"threads(count=2)": -1.0, 'gguf(type="q8_0")': -2.0, "prune_depth(layers=2)": -0.5}
    sets = [(), (0, 1), (1, 2), (0, 2)]
    names = list(effects)
    trials = [
        trial(
            i, " + ".join(names[k] for k in chosen) or "parent",
            latency=8 * 2.0 ** sum(effects[names[k]] for k in chosen),
        ) for i, chosen in enumerate(sets)
    ]
    found = explain(trials).effects
    for name, value in effects.items():
        one = effect(found, name.partition("(")[0], "latency")
        assert one.method == "regression" and one.value == pytest.approx(value, abs=0.02) and one.n == 2


def test_interaction_is_what_the_pair_does_beyond_its_parts() -> None:
    trials = [
        trial(0, "parent", latency=8.0), trial(1, "threads(count=2)", latency=4.0),
        trial(2, 'gguf(type="q8_0")', latency=2.0), trial(3, 'gguf(type="q8_0") + threads(count=2)', latency=4.0),
    ]
    (found,) = explain(trials).interactions
    assert found.technique == "gguf + threads" and found.value == pytest.approx(2.0) and found.n == 1


def test_what_raises_what_it_should_lower_backfired() -> None:
    trials = [
        trial(0, "parent", latency=1.0, memory=100.0), trial(1, "threads(count=2)", latency=3.0, memory=500.0),
    ]
    (found,) = explain(trials).backfired
    assert found.effect.technique == "threads" and found.resource == "compute"
    assert "3.00 times" in found.sentence and "\n" not in found.sentence
    unsure = trial(1, "threads(count=2)").but(measurement=measured({"latency": 1.05}, spread=0.2))
    assert explain([trials[0], unsure]).backfired == ()


def test_payback_is_cost_over_saving() -> None:
    cost = {"energy": Quantity(value=1000.0, unit="J", method="measured")}
    trials = [trial(0, "parent", energy=3.0), trial(1, 'gguf(type="q8_0")', energy=1.0).but(made=cost)]
    assert explain(trials).paybacks[1]["energy"].value == pytest.approx(500.0)


def test_rank_correlation_equals_scipy() -> None:
    pairs = [(1.0, 2.0), (2.0, 1.0), (3.0, 3.0), (3.0, 5.0), (0.5, 0.5)]
    trials = [
        trial(i + 1, f"threads(count={i + 1})", kl=v).but(screen=measured({"kl": s})) for i, (s, v) in enumerate(pairs)
    ]
    found = rank_correlation(trials, "kl")
    assert found.value == pytest.approx(spearmanr(*zip(*pairs, strict=True)).statistic) and found.n == 5
    few = rank_correlation(trials[:2], "kl")
    assert few.value is None and "3 are needed" in few.reason


def test_a_whole_table_explains_itself() -> None:
    found = explain(made_up_table())
    assert effect(found.effects, "gguf", "size").ratio is not None and effect(found.effects, "gguf", "size").value < -1
    assert effect(found.effects, "gguf", "kl").ratio is None
    assert found.failures == {"out of memory": sum(t.outcome.failed for t in made_up_table())}
    assert found.screen["kl"].value == pytest.approx(1.0)


def near() -> list[Trial]:
    return [
        trial(0, "parent", size=100.0, kl=0.0, latency=1.0),
        trial(1, 'gguf(type="q8_0")', size=30.0, kl=0.01, latency=0.5),
        trial(2, 'gguf(type="q4_0")', size=15.0, kl=0.5, latency=0.4),
        trial(3, 'gguf(type="q4_1")', Outcome.SCREENED, size=1.0, kl=0.0, latency=0.1),
    ]


def test_nearest_misses_and_the_one_limit_to_relax() -> None:
    budget = Budget.parse("size<=0.25x, kl<=0.1")
    found = misses(near(), budget, values_of(near()[0]))
    assert [m.trial.number for m in found] == [1, 0, 2] and found[0].worst == pytest.approx(0.2)
    one = relaxation(found)
    assert one is not None and str(one.limit) == "size<=0.25x" and one.value == 30.0
    error = infeasible(near(), budget, values_of(near()[0]))
    assert "relax size<=0.25x to 30" in str(error) and error.exit_code == 3 and error.relaxation == one


def test_when_one_limit_is_not_enough_the_nearest_is_named() -> None:
    budget = Budget.parse("size<=10, kl<=0.001, latency<=0.1")
    error = infeasible(near(), budget, values_of(near()[0]))
    assert error.relaxation is None and "relax both" in str(error)
    assert infeasible([], budget, {}).misses == ()
