from pathlib import Path

import pytest

from fivefold.machine import Machine
from fivefold.meters import ledger
from fivefold.meters.ledger import Cost, metered, payback, paybacks, saving
from fivefold.meters.money import Prices
from fivefold.quantity import Measurement, Quantity


def q(value: float, unit: str = "J", low: float | None = None, high: float | None = None) -> Quantity:
    return Quantity(value=value, unit=unit, method="measured", low=low, high=high)


def test_payback_is_cost_over_saving() -> None:
    tokens = payback(q(1000, "J", 900, 1200), q(2, "J/token", 1, 4))
    assert (tokens.value, tokens.low, tokens.high, tokens.unit) == (500, 225, 1200, "token")


def test_what_saves_nothing_is_never_repaid() -> None:
    for saved in (0.0, -1.0):
        assert payback(q(1), q(saved)).value is None
    assert "never" in payback(q(1), q(-1)).reason
    assert payback(Quantity.missing("J", "no counter"), q(1)).reason == "no counter"
    unsure = payback(q(10), q(1, "J/token", -1, 3))
    assert unsure.value == 10 and unsure.high is None and "not sure" in unsure.reason


def test_paybacks_of_the_resources_both_ledgers_have() -> None:
    made = Cost.of({"energy": q(500), "money": q(3, "USD"), "seconds": q(60, "s")})
    parent = Measurement({"energy": q(3), "money": q(2.0, "USD/Mtoken"), "latency": q(0.05, "s/token")})
    child = Measurement({"energy": q(1), "money": q(0.5, "USD/Mtoken"), "latency": q(0.06, "s/token")})
    out = paybacks(made, parent, child)
    assert out["energy"].value == 250
    assert out["money"].value == pytest.approx(3 / 1.5e-6)
    assert out["seconds"].value is None and "nothing is saved" in out["seconds"].reason
    assert set(paybacks(made, parent, Measurement({}))) == set()


def test_costs_add_and_peaks_do_not() -> None:
    a = Cost.of({"seconds": q(1, "s"), "energy": q(10, "J", 5, 20), "memory": q(100, "byte")})
    b = Cost.of({"seconds": q(2, "s"), "energy": q(1, "J", 1, 2), "memory": q(70, "byte")})
    total = a + b
    assert total.seconds.value == 3 and total.memory.value == 100
    assert (total.energy.value, total.energy.low, total.energy.high) == (11, 6, 22)
    assert total.disk.value is None and total.disk.reason == "not recorded"
    assert (Cost.nothing() + a).energy.value == 10
    assert Cost.of(total.quantities()) == total


def test_the_window_meters_the_work(tmp_path: Path, machine: Machine, prices: Prices) -> None:
    with metered(machine=machine, prices=prices) as window:
        block = bytearray(b"\1" * (64 << 20))
        sum(i * i for i in range(500_000))
        with pytest.raises(RuntimeError):
            _ = window.cost
        del block
    cost = window.cost
    assert cost.cpu_seconds.value > 0 and cost.seconds.value > 0
    assert cost.memory.value > 64 << 20
    if cost.energy.method == "modelled":
        idle, active = 0.33, 2.14
        joules = idle * 2 * cost.seconds.value + (active - idle) * cost.cpu_seconds.value
        assert cost.energy.value == pytest.approx(joules, rel=0.2, abs=0.1)
    usd = cost.seconds.value * 0.001 + cost.energy.value * 1e-7
    assert cost.money.value == pytest.approx(usd)
    assert cost.disk.value >= 0


def test_what_was_spent_so_far_only_grows(machine: Machine, prices: Prices) -> None:
    with metered(machine=machine, prices=prices) as window:
        first = window.so_far()
        sum(i * i for i in range(300_000))
        block = bytearray(b"\1" * (64 << 20))
        second = window.so_far()
        with pytest.raises(RuntimeError):
            _ = window.cost
        del block
    costs = [cost.quantities() for cost in (first, second, window.cost)]
    for name in ("seconds", "cpu_seconds", "energy", "money", "memory"):
        values = [cost[name].value for cost in costs]
        assert values == sorted(values) and values[0] < values[1], name
    assert costs[1]["memory"].value >= costs[0]["memory"].value + (60 << 20)
    assert [cost["energy"].method for cost in costs] == [costs[2]["energy"].method] * 3
    usd = second.seconds.value * 0.001 + second.energy.value * 1e-7
    assert second.money.value == pytest.approx(usd)


def test_a_saving_has_the_widest_interval_the_two_allow() -> None:
    s = saving(q(10, "J", 8, 13), q(4, "J", 3, 6), scale=2.0)
    assert (s.value, s.low, s.high) == (12, 4, 20)
    assert saving(Quantity.missing("J", "gone"), q(1)).reason == "gone"


def test_bytes_are_counted_as_psutil_counts_them() -> None:
    psutil = pytest.importorskip("psutil")
    wires = {n: c.bytes_sent + c.bytes_recv for n, c in psutil.net_io_counters(pernic=True).items() if n != "lo"}
    seen = ledger._network()
    assert (seen or 0) <= sum(wires.values()) + (64 << 20)
    process = psutil.Process()
    if hasattr(process, "io_counters"):
        before = process.io_counters().write_bytes
        assert before <= (ledger._written() or 0) <= process.io_counters().write_bytes
