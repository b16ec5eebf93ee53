"""The whole measurement of one model under one workload, in this process: rounds in, one Measurement out.

    measurement = measure(model, workload)            # a fresh process is the right place to call it

A round runs every request of the workload one after the other (all answers have full length: no stop tokens, so work
is equal), and, when the workload's batch is above 1, all of them again together. Times come from the single stream;
throughput, energy and money from the traffic the workload describes. Before the first round one short request warms
the engine up.

Many engines spin at barriers: a neighbour on the machine can slow them tenfold. A round in which others used more
than 15 % of the cores is repeated, up to twice the rounds in all; if too few were quiet, the least disturbed ones are
kept, and the context says how many of either there were.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from fivefold.engines import Session, open_session
from fivefold.errors import DataError
from fivefold.machine import DISTURBED, Machine, Neighbours
from fivefold.meters import compute, energy, memory, money, network
from fivefold.meters.compute import Timing
from fivefold.meters.money import Prices
from fivefold.model import Model
from fivefold.quantity import Measurement, Quantity

WARM_UP_TOKENS = 8


class Request(Protocol):
    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def max_tokens(self) -> int: ...


class Workload(Protocol):
    """The traffic: token ids in, so many tokens out, so many requests at a time."""

    @property
    def name(self) -> str: ...
    @property
    def requests(self) -> Sequence[Any]: ...
    @property
    def batch(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Round:
    """One pass over the workload. `values` are its pooled metrics; `others` the cores' share that others used."""

    values: dict[str, float]
    energy: Quantity
    timings: tuple[Timing, ...]
    others: float
    wall: float

    @property
    def disturbed(self) -> bool:
        return self.others > DISTURBED


class Bench:
    """An opened model under a workload. `round()` as often as wanted, then `finish(rounds)`.

    Opening starts the memory window; `finish` closes the session. `clock` and `session` can be given by tests.
    """

    def __init__(
        self, model: Model, workload: Workload, *, machine: Machine, prices: Prices, country: str = "world",
        session: Session | None = None, clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not workload.requests:
            raise DataError(f"the workload {workload.name!r} has no requests, so nothing can be timed; give it some")
        self.model, self.workload, self.machine = model, workload, machine
        self._prices, self._country, self._clock = prices, country, clock
        energy.intensity(country)  # an unknown country is refused before the work
        self._memory = memory.PeakMemory()
        self._memory.__enter__()
        try:
            self._session = session or open_session(model)
        except BaseException:
            self._memory.close()
            raise
        self._answers: list[list[int]] = []

    def warm_up(self) -> None:
        request = self.workload.requests[0]
        for _ in self._session.generate(list(request.prompt), min(request.max_tokens, WARM_UP_TOKENS)):
            pass

    def round(self) -> Round:
        start = self._clock()
        with Neighbours() as neighbours:
            timings, alone = self._metered(self._stream)
            output = sum(t.tokens for t in timings)
            seconds, joules = sum(t.end for t in timings), alone
            if self.workload.batch > 1:
                begin = self._clock()
                output, joules = self._metered(self._batches)
                seconds = self._clock() - begin
        values = compute.pooled(timings)
        if output:
            values["throughput"] = output / seconds
        per_token = joules.scaled(1 / output, "J/token") if output else Quantity.missing("J/token", "no token came")
        return Round(values=values, energy=per_token, timings=tuple(timings), others=neighbours.share,
                     wall=self._clock() - start)

    def finish(self, rounds: Sequence[Round], *, run: int | None = None, disturbed: int | None = None) -> Measurement:
        """Close the session and turn the kept rounds into a Measurement. `run`, `disturbed`: counts of all rounds."""
        if not rounds:
            raise ValueError("finish needs at least one round")
        described = dict(self._session.describe())
        self._memory.close()
        self._session.close()
        out = self._times(rounds) | self._shares(rounds, described) | self._costs(rounds)
        bad = sum(r.disturbed for r in rounds)
        context = {
            "workload": self.workload.name, "requests": len(self.workload.requests), "batch": self.workload.batch,
            "engine": described, "machine": self.machine.id, "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "country": self._country, "prices": self._prices.date, "rounds": len(rounds),
            "rounds_run": run or len(rounds), "rounds_disturbed": bad if disturbed is None else disturbed,
            "disturbed_kept": bad, "others": [round(r.others, 3) for r in rounds],
            "percentiles": compute.percentiles([t for r in rounds for t in r.timings]),
            "short_answers": self._short(rounds),
        }
        return Measurement(out, context)

    def _metered(self, work: Callable[[], Any]) -> tuple[Any, Quantity]:
        with energy.EnergyMeter(self.machine) as meter:
            result = work()
        return result, meter.energy

    def _stream(self) -> list[Timing]:
        answers: list[list[int]] = []
        timings = []
        for request in self.workload.requests:
            answer: list[int] = []
            timings.append(compute.time_request(self._kept(request, answer), len(request.prompt), self._clock))
            answers.append(answer)
        self._answers = answers
        return timings

    def _kept(self, request: Request, answer: list[int]) -> Callable[[], Iterable[int]]:
        def stream() -> Iterable[int]:
            for token in self._session.generate(list(request.prompt), request.max_tokens):
                answer.append(token)
                yield token

        return stream

    def _batches(self) -> int:
        """Output tokens of all requests, `batch` at a time."""
        requests, batch, tokens = self.workload.requests, self.workload.batch, 0
        for i in range(0, len(requests), batch):
            group = requests[i : i + batch]
            most = max(r.max_tokens for r in group)
            tokens += sum(len(a) for a in self._session.generate_batch([list(r.prompt) for r in group], most))
        return tokens

    def _times(self, rounds: Sequence[Round]) -> dict[str, Quantity]:
        units = {"ttft": "s", "latency": "s/token", "request": "s", "decode": "token/s", "prefill": "token/s",
                 "throughput": "token/s"}
        out = {}
        for name, unit in units.items():
            samples = [r.values[name] for r in rounds if name in r.values]
            missing = Quantity.missing(unit, "the answers were too short to time it")
            out[name] = Quantity.median_of(samples, unit) if samples else missing
        return out

    def _shares(self, rounds: Sequence[Round], described: dict[str, Any]) -> dict[str, Quantity]:
        """Operations, memory, and the shares of the machine's limits."""
        model, times = self.model, self._times(rounds)
        prompt = max(1, round(_mean(len(r.prompt) for r in self.workload.requests)))
        position = prompt + round(_mean(r.max_tokens for r in self.workload.requests)) // 2
        size, cache = memory.weight_bytes(model), memory.cache_bytes(model, described)
        element = (cache.value or 0.0) / model.blueprint.cache_bytes_per_token(1.0)
        return {
            "flops": compute.flops(model, position),
            "mfu": compute.mfu(self.machine, model.blueprint, times["prefill"], prompt,
                               compute.gemm_dtype(model, described)),
            "mbu": compute.mbu(self.machine, model.blueprint, times["decode"], position=position, element=element,
                               weights=described.get("weight_bytes") or size.value or 0.0,
                               threads=described.get("threads")),
            "memory": self._memory.peak, "gpu_memory": self._memory.gpu_peak, "size": size, "kv": cache,
            "network": network.ship_bytes(model),
        }

    def _costs(self, rounds: Sequence[Round]) -> dict[str, Quantity]:
        joules = median_energy([r.energy for r in rounds])
        speed = [r.values["throughput"] for r in rounds if "throughput" in r.values]
        missing = Quantity.missing("s/token", "no token came")
        seconds = Quantity.median_of([1 / s for s in speed], "s/token") if speed else missing
        wire, answer = network.workload_bytes(
            self.model, [r.prompt for r in self.workload.requests], self._answers
        )
        return {
            "energy": joules, "carbon": energy.carbon(joules, self._country), "request_bytes": wire,
            "money": money.per_million(self._prices, self.machine, seconds_per_token=seconds,
                                       joules_per_token=joules, answer_bytes_per_token=answer),
        }

    def _short(self, rounds: Sequence[Round]) -> int:
        wanted = [r.max_tokens for r in self.workload.requests]
        return sum(t.tokens < n for r in rounds for t, n in zip(r.timings, wanted, strict=True))


def measure(
    model: Model, workload: Workload, *, rounds: int = 5, machine: Machine | None = None,
    prices: Prices | None = None, country: str = "world", patience: float = math.inf,
) -> Measurement:
    """Every resource metric of an exported model under the workload, in this process (it should be fresh).

    After `patience` seconds no further round is begun, but two are always made (one if `rounds` is 1).
    """
    bench = Bench(model, workload, machine=machine or Machine.load(), prices=prices or Prices.load(), country=country)
    bench.warm_up()
    done: list[Round] = []
    least, end = min(2, rounds), time.perf_counter() + patience
    while len(done) < 2 * rounds and sum(not r.disturbed for r in done) < rounds:
        if len(done) >= least and time.perf_counter() > end:
            break
        done.append(bench.round())
    return bench.finish(quietest(done, rounds), run=len(done), disturbed=sum(r.disturbed for r in done))


def quietest(done: Sequence[Round], rounds: int) -> list[Round]:
    """The undisturbed rounds, filled up to `rounds` with the least disturbed ones."""
    quiet = [r for r in done if not r.disturbed][:rounds]
    noisy = sorted((r for r in done if r.disturbed), key=lambda r: r.others)
    return quiet + noisy[: rounds - len(quiet)]


def median_energy(samples: Sequence[Quantity]) -> Quantity:
    """Median over rounds; a modelled quantity keeps its model's uncertainty around the interval of the median."""
    for sample in samples:
        if sample.value is None:
            return sample
    values = [s.value for s in samples if s.value is not None]
    middle = Quantity.median_of(values, samples[0].unit, samples[0].method)
    below = min((s.low / s.value for s in samples if s.low is not None and s.value), default=1.0)
    above = max((s.high / s.value for s in samples if s.high is not None and s.value), default=1.0)
    assert middle.low is not None and middle.high is not None
    return Quantity(value=middle.value, unit=middle.unit, method=middle.method, n=middle.n,
                    low=middle.low * below, high=middle.high * above, reason=samples[0].reason)


def _mean(values: Iterable[int]) -> float:
    items = list(values)
    return sum(items) / len(items)
