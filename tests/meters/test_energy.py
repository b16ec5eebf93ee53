import re
from dataclasses import replace
from pathlib import Path

import pytest

from fivefold import machine as machine_module
from fivefold.errors import UserError
from fivefold.machine import Machine
from fivefold.meters import energy
from fivefold.meters._books import shipped
from fivefold.meters.energy import EnergyMeter, PowerModel, Rapl, carbon, intensity
from fivefold.quantity import Quantity


@pytest.fixture(autouse=True)
def no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    for name in ("POWER", "PRICES", "GRID"):
        monkeypatch.delenv(f"FIVEFOLD_{name}", raising=False)
    monkeypatch.setattr(machine_module, "POWERCAP", tmp_path / "no-powercap")


def test_modelled_joules_are_idle_of_all_cores_plus_active_of_busy_ones() -> None:
    model = PowerModel(name="x", idle=1.0, active=5.0, uncertainty=0.25)
    q = model.joules(wall=10.0, cpu=15.0, cores=2)
    assert q.value == 1.0 * 2 * 10 + (5.0 - 1.0) * 15
    assert (q.low, q.high, q.method) == (q.value * 0.75, q.value * 1.25, "modelled")
    busy = model.joules(wall=10.0, cpu=20.0, cores=2)
    assert busy.value == 5.0 * 2 * 10  # every thread active all the time


@pytest.mark.parametrize("code, cpu, name", [
    ("AuthenticAMD-25-17", "AMD EPYC 9654 96-Core Processor", "AMD EPYC 4th generation"),
    ("AuthenticAMD-25-1", "AMD EPYC 7763", "AMD EPYC 3rd generation"),
    ("AuthenticAMD-23-49", "AMD EPYC 7742", "AMD EPYC 2nd generation"),
    ("GenuineIntel-6-106", "Intel(R) Xeon(R) Platinum 8380", "Intel Ice Lake server"),
    ("GenuineIntel-6-143", "Intel(R) Xeon(R) Platinum 8480+", "an unlisted server processor"),
    ("Apple arm64", "Apple arm64", "Apple silicon"),
    ("AuthenticAMD-25-97", "AMD Ryzen 9 7950X", "an unlisted processor"),
])
def test_the_family_is_found_by_the_processor(machine: Machine, code: str, cpu: str, name: str) -> None:
    assert PowerModel.of(replace(machine, code=code, cpu=cpu)).name == name


def test_every_entry_of_the_power_book_is_sane() -> None:
    book = shipped("power")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", book["date"])
    for family in book["family"]:
        assert 0 < family["idle"] < family["active"] < 20
    assert book["family"][-1]["match"] == ""  # every processor finds a family


@pytest.mark.parametrize("name, idle, active", [  # Cloud Carbon Footprint's averages and SPECpower's own watts
    ("AMD EPYC 4th generation", (128 + 126) / 2 / 384, (817 + 827) / 2 / 384),
    ("AMD EPYC 3rd generation", 0.44538981119791665, 2.0193277994791665),
    ("AMD EPYC 2nd generation", 0.4742621527777778, 1.6929615162037037),
    ("AMD EPYC 1st generation", 0.82265625, 2.553125),
    ("Intel Ice Lake server", 110 / 160, 623 / 160),
    ("Intel Skylake and Cascade Lake server", (0.6446044454253452 + 0.6389493581523519) / 2,
     (4.193436438541878 + 3.9673047343937564) / 2),
    ("Intel Broadwell server", 0.7128342245989304, 3.6853275401069516),
    ("Intel Haswell server", 1.9005681818181814, 6.012910353535353),
    ("Intel Coffee Lake", 1.138425925925926, 5.421759259259258),
])
def test_the_power_book_repeats_its_sources(name: str, idle: float, active: float) -> None:
    family = next(f for f in shipped("power")["family"] if f["name"] == name)
    assert (family["idle"], family["active"]) == (pytest.approx(idle, rel=0.005), pytest.approx(active, rel=0.005))


def test_your_own_watts_replace_the_table(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "power.toml"
    file.write_text("idle = 2\nactive = 9.5\n")
    monkeypatch.setenv("FIVEFOLD_POWER", str(file))
    model = PowerModel.of(machine)
    assert (model.idle, model.active, model.uncertainty) == (2.0, 9.5, 0.35)
    file.write_text("idel = 2\n")
    with pytest.raises(UserError, match="did you mean 'idle'"):
        PowerModel.of(machine)
    file.write_text("idle = 'two'\n")
    with pytest.raises(UserError, match="not a number"):
        PowerModel.of(machine)


def rapl(folder: Path, microjoules: int, span: int = 1_000_000) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text("package-0")
    (folder / "energy_uj").write_text(str(microjoules))
    (folder / "max_energy_range_uj").write_text(str(span))
    return folder


def test_rapl_adds_domains_and_survives_a_wrap(tmp_path: Path) -> None:
    a, b = rapl(tmp_path / "a", 900_000), rapl(tmp_path / "b", 0)
    meter = Rapl([a, b])
    rapl(a, 100_000)  # wrapped: 0.2 J went by
    rapl(b, 300_000)
    assert meter.read() == pytest.approx(0.5)
    rapl(a, 200_000)
    assert meter.read() == pytest.approx(0.6)


def test_the_meter_measures_with_rapl(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = rapl(tmp_path / "cap" / "intel-rapl:0", 0, 10**9)
    monkeypatch.setattr(machine_module, "POWERCAP", tmp_path / "cap")
    with EnergyMeter(machine) as meter:
        rapl(counter, 7_000_000, 10**9)
    assert (meter.energy.value, meter.energy.method) == (pytest.approx(7.0), "measured")


def test_the_meter_models_without(machine: Machine) -> None:
    wall, cpu = iter([0.0, 10.0]), iter([3.0, 7.0])
    with EnergyMeter(machine, clock=lambda: next(wall), cpu_clock=lambda: next(cpu)) as meter:
        pass
    assert meter.energy.value == pytest.approx(0.33 * 2 * 10 + (2.14 - 0.33) * 4)
    assert meter.energy.method == "modelled"


def test_what_was_used_so_far_while_the_window_is_open(machine: Machine) -> None:
    wall, cpu = iter([0.0, 1.0, 10.0]), iter([3.0, 4.0, 7.0])
    with EnergyMeter(machine, clock=lambda: next(wall), cpu_clock=lambda: next(cpu)) as meter:
        early = meter.so_far()
        assert meter.energy.value is None
    assert early.value == pytest.approx(0.33 * 2 * 1 + (2.14 - 0.33) * 1) and early.method == "modelled"
    assert meter.energy.value == pytest.approx(0.33 * 2 * 10 + (2.14 - 0.33) * 4)


def test_rapl_tells_what_was_used_so_far(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = rapl(tmp_path / "cap" / "intel-rapl:0", 0, 10**9)
    monkeypatch.setattr(machine_module, "POWERCAP", tmp_path / "cap")
    with EnergyMeter(machine) as meter:
        rapl(counter, 2_000_000, 10**9)
        assert (meter.so_far().value, meter.so_far().method) == (pytest.approx(2.0), "measured")
        rapl(counter, 7_000_000, 10**9)
    assert meter.energy.value == pytest.approx(7.0)


def test_an_accelerator_that_cannot_be_read_makes_the_energy_missing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "_gpu_joules", lambda: None)
    with EnergyMeter(replace(machine, gpus=("H200",))) as meter:
        pass
    assert meter.energy.value is None and "fivefold[nvidia]" in meter.energy.reason


def test_the_accelerators_joules_are_added(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    joules = iter([1000.0, 1250.0])
    monkeypatch.setattr(energy, "_gpu_joules", lambda: next(joules))
    wall, cpu = iter([0.0, 10.0]), iter([0.0, 0.0])
    with EnergyMeter(replace(machine, gpus=("H200",)), clock=lambda: next(wall), cpu_clock=lambda: next(cpu)) as m:
        pass
    assert m.energy.value == pytest.approx(250 + 6.6)
    assert m.energy.low == pytest.approx(250 + 6.6 * 0.65)  # only the modelled part is unsure


def test_carbon_is_kwh_times_pue_times_intensity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "grid.toml"
    file.write_text("pue = 1.5\n[intensity]\nXXX = 100\n")
    monkeypatch.setenv("FIVEFOLD_GRID", str(file))
    one_kwh_per_million = Quantity(value=3.6, unit="J/token", method="measured", low=1.8, high=7.2)
    q = carbon(one_kwh_per_million, "xxx")
    assert (q.value, q.low, q.high) == (pytest.approx(150), pytest.approx(75), pytest.approx(300))
    assert q.unit == "gCO2e/Mtoken" and q.method == "modelled"


def test_countries() -> None:
    assert intensity()[0] == 481
    assert intensity("fra") == intensity("FRA") == (56, 1.0)
    with pytest.raises(UserError, match="did you mean 'DEU'"):
        intensity("DEUT")
