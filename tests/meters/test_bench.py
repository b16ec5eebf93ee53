"""The arithmetic of a whole measurement, on a session that takes time on a clock of its own."""

from dataclasses import replace
from typing import Any

import pytest
from meter_fakes import Clock, FakeSession, Request, Traffic

from fivefold.errors import DataError, UserError
from fivefold.machine import Machine
from fivefold.meters import bench as module
from fivefold.meters.bench import Bench, Round, measure, median_energy, quietest
from fivefold.meters.money import Prices
from fivefold.metrics import METRICS
from fivefold.model import Model
from fivefold.quantity import Measurement, Quantity

TRAFFIC = Traffic("test", [Request([1] * 10, 5), Request([2] * 30, 9)])


@pytest.fixture(autouse=True)
def short_work_is_charged_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 J for the single stream, 4 J for the batches: the order in which the windows open."""
    monkeypatch.setattr(module.energy, "EnergyMeter", FakeMeter)


class FakeMeter:
    joules = 10.0

    def __init__(self, machine: Machine) -> None:
        pass

    def __enter__(self) -> "FakeMeter":
        return self

    def __exit__(self, *error: object) -> None:
        self.energy = Quantity(value=self.joules, unit="J", method="modelled", low=5.0, high=20.0, reason="fake")


def bench(model: Model, machine: Machine, prices: Prices, clock: Clock, traffic: Traffic = TRAFFIC,
          **session: Any) -> Bench:
    return Bench(model, traffic, machine=machine, prices=prices, clock=clock, session=FakeSession(clock, **session))


def test_every_resource_metric_has_its_value(model: Model, machine: Machine, prices: Prices, clock: Clock) -> None:
    b = bench(model, machine, prices, clock)
    b.warm_up()
    m = b.finish([b.round(), b.round()])
    assert m.value("ttft") == pytest.approx(0.2)  # mean of 0.1 s and 0.3 s
    assert m.value("prefill") == pytest.approx(100.0)
    assert m.value("latency") == pytest.approx(0.1) and m.value("decode") == pytest.approx(10.0)
    assert m.value("request") == pytest.approx((0.1 + 0.4 + 0.3 + 0.8) / 2)
    assert m.value("throughput") == pytest.approx(14 / 1.6)
    assert m.value("energy") == pytest.approx(10 / 14)
    assert m["energy"].low == pytest.approx(5 / 14) and m["energy"].high == pytest.approx(20 / 14)
    assert m.value("carbon") == pytest.approx(10 / 14 / 3.6 * 481)
    usd = 1.6 / 14 * 0.001 + 10 / 14 * 1e-7 + 4e-9
    assert m.value("money") == pytest.approx(1e6 * usd)
    assert m.value("size") == m.value("network") == 5000
    assert m.value("flops") == model.blueprint.flops_per_token(20 + 3)
    assert m.value("mbu") == pytest.approx(10 * (5000 + 32 * 24) / 1e9)
    assert m.value("memory") > 1e6
    wanted = {name for name, row in METRICS.items() if row.resource != "quality"} - {"money_per_parameter"}
    assert set(m) == wanted
    assert all(q.unit == METRICS[name].unit for name, q in m.items())
    assert all(q.value is not None or q.reason for q in m.values())


def test_the_context_lets_a_reader_repeat_it(model: Model, machine: Machine, prices: Prices, clock: Clock) -> None:
    b = bench(model, machine, prices, clock)
    m = b.finish([b.round()], run=3, disturbed=2)
    assert m.context["workload"] == "test" and m.context["engine"]["engine"] == "fake"
    assert (m.context["rounds"], m.context["rounds_run"], m.context["rounds_disturbed"]) == (1, 3, 2)
    assert m.context["short_answers"] == 0
    assert Measurement.from_json(m.to_json()).to_json() == m.to_json()


def test_a_batch_has_its_own_throughput_and_energy(
    model: Model, machine: Machine, prices: Prices, clock: Clock
) -> None:
    traffic = replace(TRAFFIC, batch=2)
    b = bench(model, machine, prices, clock, traffic)
    m = b.finish([b.round()])
    assert m.value("throughput") == pytest.approx(18 / 0.9)  # both answers at the longer length, one tenth per step
    assert m.value("latency") == pytest.approx(0.1)
    assert m.value("energy") == pytest.approx(10 / 18)
    assert b._session.calls[-2:] == ["batch 2", "close"]


def test_short_answers_are_reported_and_one_token_has_no_latency(
    model: Model, machine: Machine, prices: Prices, clock: Clock
) -> None:
    b = bench(model, machine, prices, clock, answer=1)
    m = b.finish([b.round()])
    assert m.context["short_answers"] == 2
    assert m.value("latency") is None and "too short" in m["latency"].reason
    assert m.value("mbu") is None and m.value("ttft") is not None


def test_no_token_at_all_is_missing_not_zero(model: Model, machine: Machine, prices: Prices, clock: Clock) -> None:
    b = bench(model, machine, prices, clock, answer=0)
    m = b.finish([b.round()])
    for name in ("ttft", "throughput", "energy", "carbon", "money"):
        assert m.value(name) is None and m[name].reason


def test_bad_input_is_refused_before_the_work(model: Model, machine: Machine, prices: Prices, clock: Clock) -> None:
    with pytest.raises(DataError, match="no requests"):
        bench(model, machine, prices, clock, Traffic("empty", []))
    with pytest.raises(UserError, match="no country"):
        Bench(model, TRAFFIC, machine=machine, prices=prices, country="Atlantis", session=FakeSession(clock))


def done(others: float) -> Round:
    return Round(values={}, energy=Quantity.missing("J/token", "x"), timings=(), others=others, wall=1.0)


def test_the_quiet_rounds_are_kept_and_filled_up_with_the_least_disturbed() -> None:
    rounds = [done(x) for x in (0.9, 0.1, 0.5, 0.0, 0.2)]
    assert [r.others for r in quietest(rounds, 2)] == [0.1, 0.0]
    assert [r.others for r in quietest(rounds, 4)] == [0.1, 0.0, 0.2, 0.5]


@pytest.mark.parametrize("shares, run, kept", [
    ([0.0, 0.0, 0.0], 3, [0.0, 0.0, 0.0]),
    ([0.0, 0.9, 0.1, 0.05], 4, [0.0, 0.1, 0.05]),
    ([0.9, 0.8, 0.7, 0.6, 0.5, 0.0], 6, [0.0, 0.5, 0.6]),
])
def test_disturbed_rounds_are_repeated_up_to_twice(
    model: Model, machine: Machine, prices: Prices, clock: Clock, monkeypatch: pytest.MonkeyPatch,
    shares: list[float], run: int, kept: list[float],
) -> None:
    left = iter(shares)

    class Told:
        def __enter__(self) -> "Told":
            return self

        def __exit__(self, *error: object) -> None:
            self.share = next(left)

    monkeypatch.setattr(module, "Neighbours", Told)
    monkeypatch.setattr(module, "open_session", lambda model: FakeSession(clock))
    m = measure(model, TRAFFIC, rounds=3, machine=machine, prices=prices)
    assert m.context["rounds_run"] == run and m.context["others"] == kept
    assert m.context["rounds_disturbed"] == sum(s > 0.15 for s in shares)


@pytest.mark.parametrize(("rounds", "run"), [(5, 2), (1, 1)])
def test_without_patience_two_rounds_are_made_where_more_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, prices: Prices, model: Model, clock: Clock, rounds: int, run: int
) -> None:
    monkeypatch.setattr(module, "open_session", lambda model: FakeSession(clock))
    monkeypatch.setattr(module.Round, "disturbed", False)
    m = measure(model, TRAFFIC, rounds=rounds, machine=machine, prices=prices, patience=0.0)
    assert m.context["rounds_run"] == run


def test_median_energy_widens_by_the_models_uncertainty() -> None:
    def joules(v: float) -> Quantity:
        return Quantity(value=v, unit="J/token", method="modelled", low=v * 0.5, high=v * 2)

    q = median_energy([joules(v) for v in (1.0, 2.0, 3.0)])
    assert (q.value, q.low, q.high) == (2.0, 0.5, 6.0)
    assert median_energy([joules(1.0), Quantity.missing("J/token", "gone")]).reason == "gone"
