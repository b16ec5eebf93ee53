"""What the tests of `train` share: a tiny model, rows it can learn, a machine with round numbers, quick rehearsals."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fivefold.budget import TrainingBudget
from fivefold.machine import Machine
from fivefold.meters.money import Prices
from fivefold.model import Model
from fivefold.quantity import Quantity
from fivefold.study.judged import Exam
from fivefold.study.request import Finished, Request
from fivefold.study.resident import Added
from fivefold.study.surroundings import Surroundings
from fivefold.study.train import prepared, train

RECIPE = "lora(rank=4, rate=0.01)"
Run = tuple[Finished, list[Any]]
"""What a run left, and what it told."""


def machine() -> Machine:
    """Two cores of 4 W each when busy; 10 GFLOP/s in float32 and 20 in bfloat16."""

    def rate(value: float) -> Quantity:
        return Quantity(value=value, unit="FLOP/s", method="measured")

    return Machine(id="m", cpu="Some", code="Some", cores=2, isa=(), ram=1 << 34, gpus=(), os="Linux",
                   rates={"gemm.float32": rate(10e9), "gemm.bfloat16": rate(20e9)})


PRICES = Prices(electricity_usd_per_kwh=0.36, core_hour_usd=1.8, gpu_hour_usd=0.0, egress_usd_per_gb=0.0,
                date="2026-01-01")


def asked(model: Model, data: Path, out: Path, budget: str = "", **more: Any) -> Request:
    given = {"recipe": RECIPE, "steps": 12, "tokens_per_step": 256, **more}
    return Request(model=model, data=data, out=out, budget=TrainingBudget.parse(budget), **given)


def around(request: Request, **more: Any) -> Surroundings:
    """What the request is forecast in: float32, files in float32, a process of 100 MB (150 with libraries)."""
    model, parts, exam = prepared(request)
    given: dict[str, Any] = {
        "machine": machine(), "prices": PRICES,
        "process": lambda libraries: Added(80e6, 150e6) if libraries else Added(80e6, 100e6),
        "dtype": "float32", "exam": exam, **more,
    }
    return Surroundings(model=model, examples=parts[0], budget=request.budget, **given)


def exam(model: Model, data: Path, **more: Any) -> Exam:
    return prepared(asked(model, data, Path("nowhere"), **more))[2]


@contextmanager
def checkpoints(monkeypatch: pytest.MonkeyPatch, every: float = 0.0) -> Iterator[None]:
    """Checkpoints after every step."""
    from fivefold.training import checkpoint

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "Keeper", functools.partial(checkpoint.Keeper, every=every))
        yield


def interrupted(request: Request, at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Train until step `at` is heard."""

    def listen(event: Any) -> None:
        if getattr(event, "step", 0) == at:
            raise error

    with pytest.raises(error):
        train(request, listen)


def heard(request: Request) -> Run:
    events: list[Any] = []
    return train(request, events.append), events


def without_rehearsal(monkeypatch: pytest.MonkeyPatch, held: float | None = None) -> None:
    """A rehearsal takes a process and 10 s: 200 MB are assumed. `held` replaces what this process holds, too."""
    from fivefold.study import resident

    monkeypatch.setattr(resident, "added", lambda *given: Added(100e6, 200e6) if held is None else Added(0.0, 0.0))
    if held is not None:
        monkeypatch.setattr(resident, "now", lambda: held)
