"""Machine: what this computer is, what it can reach, and hence the physical limit of every model on it.

Generating one token reads every weight it touches and the key-value cache once, so no engine decodes faster than

    decode limit   [token/s] = read bandwidth [byte/s] / bytes per token
    prefill limit  [token/s] = GEMM rate [FLOP/s] / FLOPs per token

(the roofline: Williams, Waterman, Patterson 2009). Both rates are measured here on this machine, not taken from a
data sheet: bandwidth by threads that stream an array many times larger than the last-level cache, the GEMM rate by
square matrix products in torch. `fraction` of a limit says how much room an engine leaves; it is no promise that
the room can be won: small models are often held back by barriers between threads, not by bandwidth.

The id hashes stable facts (no host name, no free memory), so equal machines share an id. Nothing heavy is imported
with this module.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

from fivefold.files import atomic_file
from fivefold.model import Blueprint
from fivefold.paths import cache_dir
from fivefold.quantity import Quantity

PROTOCOL = 1  # raise it when a calibrated number changes its meaning: cached calibrations are then repeated
ROUNDS = 7
DISTURBED = 0.15  # a round in which others used more of the cores is repeated
GLANCE = 0.5
DTYPES = ("float32", "bfloat16", "int8")
POWERCAP = Path("/sys/class/powercap")
_ISA = {
    "avx2": "avx2", "avx512f": "avx512", "avx512_vnni": "vnni", "avx_vnni": "vnni", "avx512_bf16": "bf16",
    "amx_bf16": "amx", "asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The roofline of one model on one machine. `bytes_per_token` and `flops_per_token` at one position."""

    decode: Quantity
    prefill: Quantity
    bytes_per_token: float
    flops_per_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the doctor: what there is, how it is known, and how to know it better ("" = nothing to do)."""

    topic: str
    name: str
    quantity: Quantity | None
    text: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts and calibrated `rates`: `bandwidth.N` (byte/s, N threads), `gemm.DTYPE` (FLOP/s), `disk.read`,
    `disk.write` (byte/s); with an accelerator also `bandwidth.cuda` and `gemm.cuda.DTYPE`."""

    id: str
    cpu: str
    code: str
    cores: int
    isa: tuple[str, ...]
    ram: int
    gpus: tuple[str, ...]
    os: str
    rates: Mapping[str, Quantity] = field(default_factory=dict)
    date: str = ""
    others: float = 0.0
    """Share of the cores that other processes used while the rates were taken."""

    def __hash__(self) -> int:
        return hash(self.id)

    @classmethod
    def probe(cls) -> Machine:
        """The facts, in milliseconds; nothing is calibrated."""
        import hashlib
        import platform

        cpu, code, flags = _cpu()
        facts: dict[str, Any] = {
            "cpu": cpu, "code": code, "cores": usable_cores(),
            "isa": tuple(sorted({_ISA[f] for f in flags if f in _ISA})), "ram": usable_ram(), "gpus": _gpus(),
            "os": f"{platform.system()} {platform.machine()}",
        }
        stable = {**facts, "ram": round(facts["ram"] / 2**30)}
        digest = hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()
        return cls(id=digest, **facts)

    def calibrate(self) -> Machine:
        """A copy with measured rates. Takes 5 to 10 s; up to twice that where others use the cores meanwhile, and
        then keeps the quieter attempt (`others` tells how quiet)."""
        attempts: list[tuple[float, dict[str, Quantity]]] = []
        while len(attempts) < 2 and all(share > DISTURBED for share, _ in attempts):
            with Neighbours() as neighbours:
                rates = {**_bandwidths(self.cores), **_gemms(self.cores), **_disk(cache_dir())}
                if self.gpus:
                    rates |= _cuda_rates()
            attempts.append((neighbours.share, rates))
        others, rates = min(attempts, key=lambda attempt: attempt[0])
        return replace(self, rates=rates, date=date.today().isoformat(), others=others)

    @classmethod
    def load(cls, refresh: bool = False) -> Machine:
        """The calibrated machine, from the user's cache if it was calibrated before.

        Rates that were taken while others used the cores are taken again once the machine is quiet.
        """
        machine = cls.probe()
        file = cache_dir() / "machines" / f"{machine.id[:16]}-{PROTOCOL}.json"
        if file.is_file() and not refresh:
            try:
                known = cls.from_json(json.loads(file.read_text(encoding="utf-8")))
                if known.others <= DISTURBED or not quiet():
                    return known
            except (ValueError, KeyError, TypeError, AttributeError):
                file.unlink(missing_ok=True)
        machine = machine.calibrate()
        text = json.dumps(machine.to_json(), indent=1)
        atomic_file(file, lambda out: out.write(text.encode()))
        return machine

    def to_json(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**out, "isa": list(self.isa), "gpus": list(self.gpus),
                "rates": {k: q.to_json() for k, q in self.rates.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Machine:
        rates = {k: Quantity.from_json(q) for k, q in data["rates"].items()}
        return cls(**{**data, "isa": tuple(data["isa"]), "gpus": tuple(data["gpus"]), "rates": rates})

    def bandwidth(self, threads: int | None = None) -> Quantity:
        """Read bandwidth, byte/s, with that many threads (the nearest smaller count calibrated); None: the best."""
        known = {int(k[10:]): q for k, q in self.rates.items() if k.startswith("bandwidth.") and k[10:].isdigit()}
        if not known:
            return Quantity.missing("byte/s", "the machine is not calibrated; run: fivefold doctor")
        if threads is None:
            return max(known.values(), key=lambda q: q.value or 0.0)
        return known[max((n for n in known if n <= threads), default=min(known))]

    def gemm(self, dtype: str) -> Quantity:
        """Rate of large matrix products in that dtype, FLOP/s (int8: operations/s)."""
        missing = Quantity.missing("FLOP/s", f"no calibrated rate for {dtype}; run: fivefold doctor")
        return self.rates.get(f"gemm.{dtype}", missing)

    def limits(
        self, blueprint: Blueprint, weight_bytes: float, dtype: str, position: int, *,
        cache_element_bytes: float = 2.0, threads: int | None = None,
    ) -> Limits:
        """The roofline for a token at 0-based `position`. `weight_bytes`: of the whole file; `dtype` of the GEMMs."""
        touched = bytes_per_token(blueprint, weight_bytes, position, cache_element_bytes)
        flops = blueprint.flops_per_token(position)
        return Limits(
            decode=_per(self.bandwidth(threads), touched), prefill=_per(self.gemm(dtype), flops),
            bytes_per_token=touched, flops_per_token=flops,
        )

    @property
    def power_source(self) -> Literal["rapl", "nvml", "model"]:
        """What energy is read from on this machine, now."""
        if rapl_domains():
            return "rapl"
        return "nvml" if self.gpus and nvml() is not None else "model"

    def doctor(self) -> list[Row]:
        """What is measured, what is modelled, and how to improve what is missing."""
        rows = [
            Row(topic="machine", name="processor", quantity=None, text=f"{self.cpu}, {self.cores} usable cores"),
            Row(topic="machine", name="instructions", quantity=None, text=" ".join(self.isa) or "none that matter"),
            Row(topic="machine", name="memory", text="usable by this process",
                quantity=Quantity(value=self.ram, unit="byte", method="counted")),
            Row(topic="machine", name="accelerator", quantity=None, text=", ".join(self.gpus) or "none visible"),
        ]
        rows += [
            Row(topic="rates", name=name, quantity=q, text=q.reason or f"median of {q.n} rounds")
            for name, q in self.rates.items()
        ]
        busy = self.others > DISTURBED
        text = f"on {self.date}; others used {self.others:.0%} of the cores" if self.rates else "not calibrated"
        fix = "" if self.rates and not busy else "run on a quiet machine: fivefold doctor --refresh"
        rows.append(Row(topic="rates", name="calibration", quantity=None, text=text, fix=fix))
        return [*rows, *_power_rows(self)]


def fraction(reached: Quantity, limit: Quantity) -> Quantity:
    """How much of a limit is reached: 1 is the roofline. The interval is the reached one's over the limit's."""
    if reached.value is None or not limit.value:
        return Quantity.missing("fraction", reached.reason or limit.reason or "no limit is known", "modelled")
    low = None if reached.low is None else reached.low / (limit.high or limit.value)
    high = None if reached.high is None else reached.high / (limit.low or limit.value)
    return Quantity(value=reached.value / limit.value, unit="fraction", method=reached.method, n=reached.n,
                    low=low, high=high)


def bytes_per_token(
    blueprint: Blueprint, weight_bytes: float, position: int, cache_element_bytes: float = 2.0
) -> float:
    """Bytes read to decode one token: the weights it passes through (an untied embedding is only looked up) and
    the key-value cache of the positions before it and its own."""
    weights = weight_bytes * blueprint.matrix_parameters / blueprint.parameters
    return weights + blueprint.cache_bytes_per_token(cache_element_bytes) * (position + 1)


class Neighbours:
    """A window: `with Neighbours() as n: ...`, then `n.share`, the part of our cores that others used.

    Busy time of the cores this process may run on, less its own CPU time (children included), plus what a
    hypervisor stole, over wall time x cores. The kernel counts in ticks of 10 ms, so two ticks per core are forgiven.
    """

    share = 0.0

    def __enter__(self) -> Neighbours:
        self._before = self._read()
        return self

    def __exit__(self, *error: object) -> None:
        wall, busy, own = (b - a for a, b in zip(self._before, self._read(), strict=True))
        cores = usable_cores()
        self.share = others_share(wall=wall, busy=busy, own=own, cores=cores)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        return time.perf_counter(), sum(s for i, s in enumerate(_busy_seconds()) if i in mine), cpu_seconds()


def _busy_seconds() -> list[float]:
    """Seconds each core has worked since the system started, what a hypervisor stole included."""
    if sys.platform == "linux":  # psutil reads the same file, and is 4 MB in a process whose memory is measured
        tick = os.sysconf("SC_CLK_TCK")
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines() if re.match(r"cpu\d", line)]
        cores = {int(name[3:]): list(map(int, values)) for name, *values in rows}
        return [
            sum(used[:3] + used[5:8]) / tick if (used := cores.get(i)) else 0.0 for i in range(max(cores) + 1)
        ]
    import psutil

    return [sum(c) - c.idle for c in psutil.cpu_times(percpu=True)]


def quiet(most: float = DISTURBED) -> bool:
    """Whether others use no more than that share of our cores, in half a second."""
    with Neighbours() as neighbours:
        time.sleep(GLANCE)
    return neighbours.share <= most


def others_share(*, wall: float, busy: float, own: float, cores: int) -> float:
    """Share of `cores` x `wall` seconds that was busy but not our own, in [0, 1]."""
    ticks = 0.02 * cores
    return min(max(busy - own - ticks, 0.0) / max(wall * cores, 1e-9), 1.0)


def cpu_seconds() -> float:
    """CPU time of this process and of its children, finished and running."""
    return sum(os.times()[:4]) + sum(map(_seconds_of, _descendants()))


def _descendants() -> list[int]:
    """Process ids of the running children, their children, and so on."""
    tasks = Path("/proc/self/task")
    if not (tasks / str(os.getpid()) / "children").is_file():
        import psutil

        return [child.pid for child in psutil.Process().children(recursive=True)]
    found, parents = [], [os.getpid()]
    while parents:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for file in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
                new = list(map(int, file.read_text().split()))
                found += new
                parents += new
    return found


def _seconds_of(process: int) -> float:
    """CPU time of one process without its children; 0 when it has ended."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            values = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0
    import psutil

    with contextlib.suppress(psutil.Error):
        times = psutil.Process(process).cpu_times()
        return float(times.user + times.system)
    return 0.0


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_ram() -> int:
    """Bytes of memory: the machine's, or the container's limit if that is smaller."""
    if sys.platform == "linux":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        import psutil

        total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


def rapl_domains() -> list[Path]:
    """Energy counters that can be read: one per package, and the memory of each where it has its own."""
    found = []
    for folder in sorted(POWERCAP.glob("intel-rapl:*")) if POWERCAP.is_dir() else []:
        try:
            name = (folder / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                int((folder / "energy_uj").read_text())
                found.append(folder)
        except (OSError, ValueError):
            continue
    return found


def nvml() -> Any | None:
    """The initialised NVML module, or None where there is no driver or no nvidia-ml-py."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # ImportError, or any of NVML's own errors: there is nothing to read then
        return None
    return pynvml


def _power_rows(machine: Machine) -> list[Row]:
    rows = []
    if rapl_domains():
        rows.append(Row(topic="power", name="processor energy", quantity=None, text="measured: RAPL counters"))
    else:
        there = POWERCAP.is_dir() and any(POWERCAP.glob("intel-rapl:*"))
        fix = (
            "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj" if there
            else "run on a machine with RAPL counters (bare metal Linux), or enter your own watts in power.toml"
        )
        why = "its counters are not readable" if there else "this machine shows no counters"
        rows.append(Row(topic="power", name="processor energy", quantity=None,
                        text=f"modelled from a table of watts per core: {why}", fix=fix))
    if machine.gpus:
        seen = nvml() is not None
        rows.append(Row(topic="power", name="accelerator energy", quantity=None,
                        text="measured: NVML" if seen else "not counted",
                        fix="" if seen else "pip install 'fivefold[nvidia]'"))
    return rows


def _per(rate: Quantity, cost: float) -> Quantity:
    if rate.value is None:
        return Quantity.missing("token/s", rate.reason, "modelled")
    return rate.scaled(1 / cost, "token/s", "modelled")


def _cpu() -> tuple[str, str, Sequence[str]]:
    """Name, vendor-family-model code, and the processor's flags."""
    import platform

    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""

    def first(*keys: str) -> str:
        for key in keys:
            if found := re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE):
                return found[1].strip()
        return ""

    name = first("model name") or platform.processor() or platform.machine()
    code = "-".join(filter(None, (first("vendor_id", "CPU implementer"), first("cpu family", "CPU architecture"),
                                  first("model", "CPU part"))))
    if sys.platform == "darwin":
        name = f"Apple {platform.machine()}" if platform.machine() == "arm64" else name
    return name, code or name, first("flags", "Features").split()


def _gpus() -> tuple[str, ...]:
    """Names of CUDA devices torch can use. torch is imported only where a driver is installed."""
    import shutil

    if not (Path("/proc/driver/nvidia").is_dir() or Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi")):
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _last_level_cache() -> int:
    """Bytes of the largest cache of core 0; 32 MiB where the system does not tell."""
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number = re.match(r"(\d+)K", file.read_text())
        sizes.append(int(number[1]) << 10 if number else 0)
    return max(sizes)


def _bandwidths(cores: int) -> dict[str, Quantity]:
    """Streaming read: each thread takes the maximum of its share of one array (numpy lets go of the GIL)."""
    import numpy as np

    size = int(min(max(512 << 20, 8 * _last_level_cache()), usable_ram() / 8))
    array = np.zeros(size // 8, dtype=np.int64)
    array += 1  # every page is really there
    counts = sorted({*(2**i for i in range(cores.bit_length()) if 2**i <= cores), cores})
    samples: dict[int, list[float]] = {n: [] for n in counts}
    for _ in range(ROUNDS):
        for n in counts:
            threads = [threading.Thread(target=part.max) for part in np.array_split(array, n)]

            def work(threads: list[threading.Thread] = threads) -> None:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()

            samples[n].append(array.nbytes / _timed(work))
    return {f"bandwidth.{n}": Quantity.median_of(s, "byte/s") for n, s in samples.items()}


def _gemms(cores: int) -> dict[str, Quantity]:
    """Square products in torch. A dtype this build cannot multiply is missing, with the reason."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        out = {}
        for dtype in DTYPES:
            try:
                out[f"gemm.{dtype}"] = _gemm(dtype)
            except (RuntimeError, NotImplementedError) as error:
                sentence = str(error).splitlines()[0]
                out[f"gemm.{dtype}"] = Quantity.missing("FLOP/s", f"torch cannot multiply {dtype} here: {sentence}")
        return out
    finally:
        torch.set_num_threads(before)


def _gemm(dtype: str, device: str = "cpu", largest: int = 2048) -> Quantity:
    import torch

    def operands(n: int) -> Callable[[], Any]:
        if dtype == "int8":
            a = torch.randint(-8, 8, (n, n), dtype=torch.int8, device=device)
            return lambda: torch._int_mm(a, a)
        a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
        return lambda: a @ a

    def timed(work: Callable[[], Any]) -> float:
        def synced() -> None:
            work()
            if device != "cpu":
                torch.cuda.synchronize()

        return _timed(synced)

    n, work = 512, operands(512)
    timed(work)
    while n < largest and min(timed(work), timed(work)) < 0.05:  # where a dtype is emulated, a smaller product
        n *= 2
        work = operands(n)
        timed(work)
    return Quantity.median_of([2 * n**3 / timed(work) for _ in range(ROUNDS)], "FLOP/s")


def _cuda_rates() -> dict[str, Quantity]:
    """Of device 0: matrix products, and a reduction over 2 GiB that is read once."""
    import torch

    out = {f"gemm.cuda.{dtype}": _gemm(dtype, "cuda", 8192) for dtype in ("float32", "bfloat16")}
    array = torch.ones(1 << 29, device="cuda")

    def work() -> None:
        array.max()
        torch.cuda.synchronize()

    work()
    rounds = [array.nbytes / _timed(work) for _ in range(ROUNDS)]
    return {**out, "bandwidth.cuda": Quantity.median_of(rounds, "byte/s")}


def _disk(folder: Path, size: int = 64 << 20) -> dict[str, Quantity]:
    """Write with fsync, then read back after the page cache has been told to forget the file."""
    import tempfile

    data, writes, reads = os.urandom(size), [], []
    for _ in range(3):
        with tempfile.TemporaryFile(dir=folder) as file:

            def write(file: Any = file) -> None:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

            writes.append(size / _timed(write))
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.seek(0)
                reads.append(size / _timed(file.read))
    unread = Quantity.missing("byte/s", "this system cannot drop a file from its cache, so a read would be of memory")
    return {
        "disk.write": Quantity.median_of(writes, "byte/s"),
        "disk.read": Quantity.median_of(reads, "byte/s") if reads else unread,
    }
