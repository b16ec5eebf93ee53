"""In turn: a study's last step measures the parent and the picks in the same minutes, so that their ratios are paired.

The trials of a search are measured minutes apart, and a machine's speed drifts meanwhile: their quotient carries the
drift of both. In rounds that visit the parent and every pick in turn the drift is in both and cancels; the ratio is
formed in each round and shown as the median over rounds with its interval (`meters.interleaved`).

A round needs time for the slowest of them, which is mostly the parent, so it runs an evenly spread part of the
workload: more short rounds say more than few long ones. With n requests a round, r rounds cost

    opening all + n * r * (sum over all of the seconds of one request)

and `turn` first raises r to `MOST` with n = 1, then n. Both seconds come from the trials' own records. Does not help
for what does not drift (bytes on disk, peak memory); those ratios stay those of the full measurements.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fivefold.errors import FivefoldError, TrialFailure, UserError
from fivefold.model import Model
from fivefold.quantity import Measurement
from fivefold.study.pareto import Goal
from fivefold.study.picks import picks, quotient
from fivefold.study.trial import Outcome, Trial

LEAST, MOST = 3, 6
"""Rounds. With 6 the full range of the ratios is a 95 % interval of their median; below, it is only the range."""
ROUNDED = ("latency", "decode", "ttft", "prefill", "energy")
"""Metrics whose ratio is formed in each round."""
PHASE = "in turn"
START = 2.0
"""Seconds to start the process that leads the others."""


@dataclass(frozen=True, slots=True)
class Turn:
    """`requests` of the workload in each of `rounds`; `expected` seconds in all."""

    requests: int
    rounds: int
    expected: float


def unpaired(trials: Sequence[Trial], goal: Goal) -> list[Trial]:
    """The picks that were not measured in turn with the parent yet; one whose attempt failed is not tried again."""
    return [p.trial for p in picks(trials, goal) if not p.trial.paired.context]


def turn(arms: Sequence[Trial], seconds: float) -> Turn:
    """The best use of `seconds` for these measured trials, the parent among them; the least one if they are too few."""
    prices = [_price(t) for t in arms]
    opening, request = START + sum(p[0] for p in prices), sum(p[1] for p in prices)
    context = arms[0].measurement.context
    count, batch = int(context.get("requests", 1)), int(context.get("batch", 1))
    affordable = max(0.0, seconds - opening) / max(request, 1e-9)
    most = count if math.isinf(affordable) else min(count, max(1, int(affordable / MOST)))
    requests = min(count, batch * max(1, most // batch))
    rounds = MOST if math.isinf(affordable) else max(LEAST, min(MOST, int(affordable / requests)))
    return Turn(requests, rounds, opening + requests * rounds * request)


def _price(trial: Trial) -> tuple[float, float]:
    """(seconds to open it, seconds of one request and its part of a batch) by the trial's own measurement."""
    found, context = trial.measurement, trial.measurement.context
    request = found.value("request") or 0.0
    if int(context.get("batch", 1)) > 1:
        request *= 2.0
    rounds = request * int(context.get("requests", 1)) * int(context.get("rounds_run", 1))
    return max(0.0, trial.spent.get("measure", 0.0) - rounds), request


def spread(requests: Sequence[Any], count: int) -> list[Any]:
    """`count` of the requests, evenly spread and in order."""
    count = min(count, len(requests))
    return [requests[i * len(requests) // count] for i in range(count)]


def measured(
    parent: Model, others: Mapping[int, Model], traffic: Callable[[Model], Any], *, rounds: int,
    patience: float = math.inf, room: float = math.inf, sizes: Mapping[int, float] | None = None, **books: Any,
) -> dict[int, Measurement]:
    """Number -> ratios to the parent, by in-turn rounds; a failure is an empty Measurement with its sentence.

    All are open at once; when they would need more than `room` bytes by `sizes` (0 is the parent), or when one of them
    fails, each is taken alone with the parent. `traffic` is the workload of a model; `books` go to `Interleaved`:
    machine, prices, country.
    """
    known = sizes or {}
    fit = sum(known.get(n, 0.0) for n in (0, *others)) <= room
    if fit and len(others) > 1:
        try:
            return _rounds(parent, others, traffic, rounds, patience, books)
        except (UserError, TrialFailure):
            pass  # which one it was, and how the others fare, is seen one by one
    found: dict[int, Measurement] = {}
    for number, model in others.items():
        if known.get(0, 0.0) + known.get(number, 0.0) > room:
            said = "it and the parent do not fit into memory together; measure on a machine with more"
            found[number] = failed(Outcome.OUT_OF_MEMORY, said)
            continue
        try:
            found |= _rounds(parent, {number: model}, traffic, rounds, patience / len(others), books)
        except (UserError, TrialFailure) as error:
            found[number] = failed(outcome_of(error), str(error))
    return found


def _rounds(
    parent: Model, others: Mapping[int, Model], traffic: Callable[[Model], Any], rounds: int, patience: float,
    books: Mapping[str, Any],
) -> dict[int, Measurement]:
    from fivefold.meters.interleaved import Interleaved, Job

    jobs = [Job(model=parent, workload=traffic(parent), label="parent")]
    jobs += [Job(model=m, workload=traffic(m), label=f"trial {n}") for n, m in others.items()]
    end = time.monotonic() + patience
    with Interleaved(jobs, **books) as arms:
        base, *rest = arms.run(rounds, end - time.monotonic())
        return {
            number: _ratios(arms, i, base, measurement, len(jobs[0].workload.requests))
            for i, (number, measurement) in enumerate(zip(others, rest, strict=True), start=1)
        }


def _ratios(arms: Any, i: int, base: Measurement, measurement: Measurement, requests: int) -> Measurement:
    found = {name: arms.ratio(name, i, 0) for name in ROUNDED}
    found["money"] = quotient(measurement.get("money"), base.get("money"))
    kept = {n: q.scaled(1.0, "x", base[n].method) for n, q in found.items() if q is not None and q.value is not None}
    context = {
        "outcome": str(Outcome.MEASURED), "sentence": "", "rounds": len(arms.kept), "requests": requests,
        "date": base.context.get("date", ""),
    }
    return Measurement(kept, context)


def failed(outcome: Outcome, sentence: str) -> Measurement:
    return Measurement({}, {"outcome": str(outcome), "sentence": sentence})


def outcome_of(error: FivefoldError) -> Outcome:
    return Outcome(error.outcome) if isinstance(error, TrialFailure) else Outcome.REFUSED
