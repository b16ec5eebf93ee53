from pathlib import Path

import pytest

from fivefold.errors import UserError
from fivefold.machine import Machine
from fivefold.meters.money import Prices, cost, per_million, per_parameter
from fivefold.quantity import Quantity


def q(value: float | None, unit: str, low: float | None = None, high: float | None = None) -> Quantity:
    return Quantity(value=value, unit=unit, method="measured", low=low, high=high)


def test_a_token_costs_its_machine_time_its_electricity_and_its_egress(machine: Machine, prices: Prices) -> None:
    # 2 cores x 1.8 USD/h = 0.001 USD/s; 0.36 USD/kWh = 1e-7 USD/J; 1 USD/GB = 1e-9 USD/byte
    usd = per_million(prices, machine, seconds_per_token=q(0.5, "s/token"), joules_per_token=q(10, "J/token"),
                      answer_bytes_per_token=4)
    assert usd.value == pytest.approx(1e6 * (0.5 * 0.001 + 10 * 1e-7 + 4e-9))
    assert (usd.unit, usd.method) == ("USD/Mtoken", "modelled")


def test_intervals_add(machine: Machine, prices: Prices) -> None:
    usd = cost(prices, machine, seconds=q(100, "s", 90, 120), joules=q(1e6, "J", 5e5, 2e6))
    assert usd.value == pytest.approx(0.1 + 0.1)
    assert (usd.low, usd.high) == (pytest.approx(0.09 + 0.05), pytest.approx(0.12 + 0.2))


def test_unknown_energy_makes_the_price_unknown(machine: Machine, prices: Prices) -> None:
    usd = cost(prices, machine, seconds=q(1, "s"), joules=Quantity.missing("J", "no counter"))
    assert usd.value is None and usd.reason == "no counter"


def test_per_parameter() -> None:
    assert per_parameter(q(27.0, "USD"), 135_000_000).value == pytest.approx(2e-7)


def test_the_shipped_machine_hours_follow_from_purchase_price_and_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FIVEFOLD_PRICES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    hours_in_use = 5 * 365 * 24 / 2
    shipped = Prices.load()
    assert shipped.core_hour_usd == pytest.approx(10_000 / 64 / hours_in_use, rel=0.01)
    assert shipped.gpu_hour_usd == pytest.approx(30_000 / hours_in_use, rel=0.03)


def test_the_users_book_overrides_key_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIVEFOLD_PRICES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    shipped = Prices.load()
    (tmp_path / "fivefold").mkdir()
    file = tmp_path / "fivefold" / "prices.toml"
    file.write_text("core_hour_usd = 0.05\nelectricity_usd_per_kwh = 0\n")
    mine = Prices.load()
    assert (mine.core_hour_usd, mine.electricity_usd_per_kwh) == (0.05, 0.0)
    assert mine.egress_usd_per_gb == shipped.egress_usd_per_gb
    other = tmp_path / "other.toml"
    other.write_text("core_hour_usd = 0.5\n")
    monkeypatch.setenv("FIVEFOLD_PRICES", str(other))
    assert Prices.load().core_hour_usd == 0.5
    assert Prices.load(file).core_hour_usd == 0.05


@pytest.mark.parametrize("text, says", [
    ("core_hour = 1", "did you mean 'core_hour_usd'"), ("gpu_hour_usd = -1", "not a number"),
    ("gpu_hour_usd = true", "not a number"), ("gpu_hour_usd = nan", "not a number"), ("gpu_hour_usd", "not readable"),
])
def test_a_bad_book_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(text + "\n")
    with pytest.raises(UserError, match=says):
        Prices.load(file)
    with pytest.raises(UserError, match="does not exist"):
        Prices.load(tmp_path / "absent.toml")
