"""A measuring process: `python -m fivefold.meters.worker job.json`, driven line by line.

The job is a JSON object: `model` (model_to_json), `workload` {name, batch, requests: [{prompt, max_tokens}]},
`machine`, `prices` and `country`. On standard input come JSON lines, and each is answered by one on standard output:

    (opened)                          {"ready": true}
    {"do": "round"}                   {"round": 0, "others": 0.02, "disturbed": false, "values": {...}, "energy": ...}
    {"do": "finish", "keep": [0, 2]}  {"measurement": {...}}  and the process ends
    anything that fails               {"error": "one sentence", "kind": "ModelError"}  and the process ends

Between two lines the process sleeps, so several workers can take turns on one machine. What engines print goes to
standard error. End of input ends the process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from fivefold.errors import FivefoldError, UserError
from fivefold.machine import Machine
from fivefold.meters.bench import Bench, Round
from fivefold.meters.money import Prices
from fivefold.model import Model, model_from_json, model_to_json
from fivefold.quantity import Quantity


@dataclass(frozen=True)
class PlainRequest:
    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class PlainWorkload:
    """A workload as it travels: token ids and lengths only."""

    name: str
    requests: list[PlainRequest]
    batch: int = 1

    @classmethod
    def of(cls, workload: Any) -> PlainWorkload:
        """Of anything with name, batch and requests."""
        requests = [PlainRequest(list(map(int, r.prompt)), int(r.max_tokens)) for r in workload.requests]
        return cls(workload.name, requests, workload.batch)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PlainWorkload:
        return cls(data["name"], [PlainRequest(**r) for r in data["requests"]], data["batch"])


def job_to_json(model: Model, workload: Any, machine: Machine, prices: Prices, country: str) -> dict[str, Any]:
    return {
        "model": model_to_json(model), "workload": asdict(PlainWorkload.of(workload)), "machine": machine.to_json(),
        "prices": prices.to_json(), "country": country,
    }


def open_bench(job: Mapping[str, Any]) -> Bench:
    return Bench(
        model_from_json(job["model"]), PlainWorkload.from_json(job["workload"]),
        machine=Machine.from_json(job["machine"]), prices=Prices(**job["prices"]), country=job["country"],
    )


def serve(bench: Bench, lines: Iterable[str], reply: Callable[[dict[str, Any]], None]) -> None:
    """Answer each line; returns after `finish` or at the end of the lines."""
    bench.warm_up()
    reply({"ready": True})
    rounds: list[Round] = []
    for line in lines:
        ask = json.loads(line)
        if ask["do"] == "round":
            rounds.append(bench.round())
            reply(_round_to_json(len(rounds) - 1, rounds[-1]))
        elif ask["do"] == "finish":
            kept = [rounds[i] for i in ask["keep"]]
            disturbed = sum(r.disturbed for r in rounds)
            measurement = bench.finish(kept, run=len(rounds), disturbed=disturbed)
            reply({"measurement": measurement.to_json()})
            return
        else:
            raise UserError(f"a measuring worker cannot {ask['do']!r}; it can round and finish")


def _round_to_json(number: int, done: Round) -> dict[str, Any]:
    energy: Quantity = done.energy
    return {"round": number, "others": done.others, "disturbed": done.disturbed, "wall": done.wall,
            "values": done.values, "energy": energy.to_json()}


def main(arguments: list[str], lines: Iterable[str], out: TextIO) -> int:
    def reply(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        serve(open_bench(json.loads(Path(arguments[0]).read_text(encoding="utf-8"))), lines, reply)
    except FivefoldError as error:
        reply({"error": str(error), "kind": type(error).__name__})
        return error.exit_code
    except MemoryError:
        reply({"error": "the model does not fit into memory", "kind": "OutOfMemory"})
        return 1
    return 0


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever an engine prints must not break the protocol
    sys.exit(main(sys.argv[1:], sys.stdin, replies))
