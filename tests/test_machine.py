"""The roofline against closed forms, the cache against itself, the calibration against common sense."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fivefold import machine as module
from fivefold.machine import Machine, Neighbours, bytes_per_token, fraction, others_share, rapl_domains
from fivefold.model import Blueprint
from fivefold.quantity import Quantity


def rate(value: float, low: float | None = None, high: float | None = None, unit: str = "byte/s") -> Quantity:
    return Quantity(value=value, unit=unit, method="measured", low=low, high=high)


def machine(**rates: Quantity) -> Machine:
    return Machine(id="m", cpu="Test", code="T", cores=4, isa=(), ram=1 << 30, gpus=(), os="Linux",
                   rates={k.replace("_", "."): q for k, q in rates.items()})


def blueprint(tied: bool) -> Blueprint:
    return Blueprint(family="llama", layers=2, width=8, heads=2, kv_heads=1, head_dim=4, ffn=16, vocab=32,
                     context=64, tied=tied)


def test_decode_limit_is_bandwidth_over_the_bytes_of_a_token() -> None:
    m = machine(bandwidth_2=rate(1e9, 0.9e9, 1.1e9), gemm_float32=rate(1e9, unit="FLOP/s"))
    weights, position = 10_000, 9
    limits = m.limits(blueprint(tied=True), weights, "float32", position)
    kv = 2 * 2 * 1 * 4 * 2.0 * (position + 1)  # keys and values x layers x kv heads x head dim x bytes x positions
    assert limits.bytes_per_token == weights + kv
    assert limits.decode.value == pytest.approx(1e9 / (weights + kv))
    assert limits.decode.low == pytest.approx(0.9e9 / (weights + kv))
    assert limits.decode.method == "modelled"


def test_an_untied_embedding_is_not_read() -> None:
    b = blueprint(tied=False)
    matrix = 2 * (8 * 4 * (2 * 2 + 2 * 1) + 3 * 8 * 16) + 32 * 8
    total = matrix + 32 * 8
    assert bytes_per_token(b, total * 4, 0, 0.0) == matrix * 4


def test_prefill_limit_is_gemm_rate_over_operations() -> None:
    m = machine(bandwidth_1=rate(1.0), gemm_bfloat16=rate(5e9, unit="FLOP/s"))
    matrix = 2 * (8 * 4 * 6 + 3 * 8 * 16) + 32 * 8
    assert m.limits(blueprint(True), 1, "bfloat16", 3).prefill.value == pytest.approx(
        5e9 / (2 * matrix + 4 * 2 * 2 * 4 * 4)
    )


def test_a_rate_that_was_not_calibrated_is_missing_with_its_reason() -> None:
    limits = machine(bandwidth_1=rate(1.0)).limits(blueprint(True), 1, "int8", 0)
    assert limits.prefill.value is None and "int8" in limits.prefill.reason
    assert machine().bandwidth().value is None


def test_bandwidth_by_threads() -> None:
    m = machine(bandwidth_1=rate(10.0), bandwidth_2=rate(18.0), bandwidth_4=rate(16.0))
    assert [m.bandwidth(n).value for n in (1, 2, 3, 4, 99)] == [10, 18, 18, 16, 16]
    assert m.bandwidth().value == 18


def test_fraction_of_a_limit() -> None:
    f = fraction(rate(5.0, 4.0, 6.0), rate(10.0, 8.0, 12.0))
    assert (f.value, f.low, f.high) == (0.5, pytest.approx(4 / 12), pytest.approx(6 / 8))
    assert fraction(rate(5.0), Quantity.missing("byte/s", "because")).reason == "because"


def test_probe_identifies_the_hardware_and_not_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Machine.probe()
    monkeypatch.setattr("platform.node", lambda: "another-host")
    assert Machine.probe() == first and len(first.id) == 64
    monkeypatch.setattr(module, "usable_cores", lambda: first.cores + 1)
    assert Machine.probe().id != first.id


def test_load_calibrates_once_and_again_when_asked_or_when_the_cache_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path))
    calls = []

    def calibrate(self: Machine) -> Machine:
        calls.append(1)
        return replace(self, rates={"bandwidth.1": rate(float(len(calls)))}, date="2026-01-01", others=0.1)

    monkeypatch.setattr(Machine, "calibrate", calibrate)
    first = Machine.load()
    assert Machine.load() == first and len(calls) == 1
    assert Machine.load(refresh=True).bandwidth().value == 2.0
    (file,) = (tmp_path / "machines").iterdir()
    file.write_text("{")
    assert Machine.load().bandwidth().value == 3.0
    assert Machine.from_json(json.loads(file.read_text())) == Machine.load()


@pytest.mark.parametrize(("quiet", "times"), [(True, 2), (False, 1)])
def test_rates_taken_beside_other_work_are_taken_again_when_it_is_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: bool, times: int
) -> None:
    calls: list[float] = []

    def calibrate(self: Machine) -> Machine:
        calls.append(0.6 if not calls else 0.0)
        return replace(self, rates={"bandwidth.1": rate(1e9)}, others=calls[-1])

    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path))
    monkeypatch.setattr(Machine, "calibrate", calibrate)
    monkeypatch.setattr("fivefold.machine.quiet", lambda: quiet)
    assert Machine.load().others == 0.6
    assert [Machine.load().others for _ in range(2)] == [calls[-1]] * 2 and len(calls) == times


def test_calibrated_rates_have_the_right_order_of_magnitude(tmp_path: Path) -> None:
    rates = module._bandwidths(1) | module._disk(tmp_path, 4 << 20)
    assert 5e8 < rates["bandwidth.1"].value < 5e12
    assert 1e6 < rates["disk.write"].value < 1e12
    for q in rates.values():
        assert q.value is None or q.low <= q.value <= q.high
    assert 1e8 < module._gemm("float32", largest=512).value < 1e15


def test_a_gemm_that_torch_refuses_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dtype: str) -> Quantity:
        if dtype == "int8":
            raise RuntimeError("not on this build\nstack")
        return rate(1.0, unit="FLOP/s")

    monkeypatch.setattr(module, "_gemm", refuse)
    out = module._gemms(1)
    assert out["gemm.float32"].value == 1.0
    assert out["gemm.int8"].value is None and out["gemm.int8"].reason.endswith("not on this build")


def test_others_share_is_busy_time_that_was_not_ours() -> None:
    assert others_share(wall=2.0, busy=3.04, own=2.0, cores=2) == pytest.approx(1.0 / 4)
    assert others_share(wall=2.0, busy=1.0, own=2.0, cores=2) == 0.0
    assert others_share(wall=0.001, busy=0.03, own=0.0, cores=2) == 0.0  # below the kernel's resolution


def test_neighbours_reads_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter([(10.0, 100.0, 5.0), (20.0, 110.04, 9.0)])
    monkeypatch.setattr(Neighbours, "_read", staticmethod(lambda: next(reads)))
    monkeypatch.setattr(module, "usable_cores", lambda: 2)
    with Neighbours() as n:
        pass
    assert n.share == pytest.approx(6.0 / 20)


def powercap(folder: Path, readable: bool) -> Path:
    names = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram"}
    for name, domain in names.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "name").write_text(domain + "\n")
        if readable:
            (folder / name / "energy_uj").write_text("123\n")
    return folder


def test_packages_and_their_memory_are_counted_but_not_their_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POWERCAP", powercap(tmp_path, readable=True))
    assert [d.name for d in rapl_domains()] == ["intel-rapl:0", "intel-rapl:0:1"]
    assert machine().power_source == "rapl"


def test_the_doctor_says_what_is_missing_and_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POWERCAP", powercap(tmp_path, readable=False))
    rows = {r.name: r for r in machine().doctor()}
    assert "chmod a+r" in rows["processor energy"].fix
    assert "doctor --refresh" in rows["calibration"].fix
    quiet = replace(machine(bandwidth_1=rate(1.0)), date="2026-01-01")
    assert {r.name: r for r in quiet.doctor()}["calibration"].fix == ""
    noisy = replace(quiet, others=0.5)
    assert "50%" in {r.name: r for r in noisy.doctor()}["calibration"].text
    assert {r.name: r for r in noisy.doctor()}["calibration"].fix


@pytest.mark.parametrize("shares, runs, kept", [([0.0], 1, 0.0), ([0.6, 0.1], 2, 0.1), ([0.3, 0.6], 2, 0.3)])
def test_a_disturbed_calibration_is_repeated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: list[float], runs: int, kept: float
) -> None:
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path))
    left, calls = iter(shares), []
    monkeypatch.setattr(module, "others_share", lambda **_: next(left))
    monkeypatch.setattr(module, "_bandwidths", lambda n: calls.append(n) or {"bandwidth.1": rate(float(len(calls)))})
    monkeypatch.setattr(module, "_gemms", lambda n: {})
    monkeypatch.setattr(module, "_disk", lambda folder: {})
    done = machine().calibrate()
    assert len(calls) == runs and done.others == kept
    assert done.bandwidth().value == 1.0 + shares.index(kept)


def test_the_kernels_own_tables_are_read_as_psutil_reads_them() -> None:
    psutil = pytest.importorskip("psutil")
    times = psutil.cpu_times(percpu=True)
    ours = module._busy_seconds()
    for mine, c in zip(ours, times, strict=True):
        unused = c.idle + sum(getattr(c, name, 0.0) for name in ("iowait", "guest", "guest_nice"))
        assert mine == pytest.approx(sum(c) - unused, abs=30)
    assert module.usable_ram() <= psutil.virtual_memory().total


def test_cpu_seconds_count_running_grandchildren() -> None:
    busy = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    inner = f"{busy}print('done', flush=True); import sys; sys.stdin.read()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    before = module.cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdout.readline() == b"done\n"
        assert len(module._descendants()) >= 2
        assert module.cpu_seconds() - before >= 0.28
    assert child.pid not in module._descendants()
