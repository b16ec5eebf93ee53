"""How a run fails: memory, losses that are no numbers, a full disk; and how a limit ends it."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tuning import RECIPE, asked, checkpoints, heard, interrupted, without_rehearsal

from fivefold.budget import TrainingBudget
from fivefold.errors import ModelError, NotFinite, OutOfMemory, StoreError
from fivefold.meters.ledger import metered
from fivefold.model import Model, TrainPlan
from fivefold.recipe import Recipe
from fivefold.study.forecast import Forecast
from fivefold.study.request import Request
from fivefold.study.train import slower, train
from fivefold.testing.contract import sentence
from fivefold.training.checkpoint import STATE
from fivefold.training.loop import Step

pytestmark = pytest.mark.usefixtures("quick")


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_memory_that_is_exceeded_stops_with_a_sentence_and_more_of_it_goes_on(
    pupil: Model, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_rehearsal(monkeypatch, held=1e6)
    with checkpoints(monkeypatch), pytest.raises(OutOfMemory, match="100 MB are allowed") as caught:
        train(asked(pupil, lessons, tmp_path / "out", "memory<=100MB"))
    assert "were forecast" in sentence(caught.value) and str(tmp_path) not in str(caught.value)
    assert train(asked(pupil, lessons, tmp_path / "out", "memory<=8GB")).steps == 12


def test_an_allocation_that_fails_is_a_sentence(
    pupil: Model, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    mapped = "transformers cannot read it (unable to mmap 9 bytes: Cannot allocate memory (12)); give a folder"
    for error in (MemoryError(), RuntimeError(said), ModelError(mapped), RuntimeError("could not create a primitive")):
        def fail(*given: Any, error: Exception = error, **named: Any) -> None:
            raise error

        monkeypatch.setattr("fivefold.training.run.prepared", fail)
        with pytest.raises(OutOfMemory, match="no memory left") as caught:
            train(asked(pupil, lessons, tmp_path / "out"))
        sentence(caught.value)
    monkeypatch.setattr("fivefold.training.run.prepared", lambda *given: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        train(asked(pupil, lessons, tmp_path / "out"))


@contextmanager
def broken_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> Iterator[None]:
    """The loss is no number from then on."""
    from fivefold.training import run

    real = run.loss_of

    def loss_of(*given: Any) -> Any:
        loss, left = real(*given), [calls]

        def broken(batch: Any) -> Any:
            left[0] -= 1
            return loss(batch) * (1.0 if left[0] >= 0 else math.nan)

        return broken

    with monkeypatch.context() as patch:
        patch.setattr(run, "loss_of", loss_of)
        yield


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint_and_says_what_to_try(
    pupil: Model, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(pupil, lessons, tmp_path / "out")
    with checkpoints(monkeypatch), broken_after(monkeypatch, 6), pytest.raises(NotFinite) as caught:
        train(request)
    said = sentence(caught.value)
    assert "became nan at step" in said and "'lora(rank=4, rate=0.001)'" in said and "keeps the last good" in said
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "out"))
    assert not (tmp_path / "out" / "model").exists()
    with checkpoints(monkeypatch):
        done, events = heard(request)
    assert events[0].resumed > 0 and done.steps == 12


def test_a_model_that_is_no_number_itself_is_told_apart(
    pupil: Model, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for calls, out in ((0, "one"), (1, "two")):
        with broken_after(monkeypatch, calls), pytest.raises(NotFinite, match="as it was given") as caught:
            train(asked(pupil, lessons, tmp_path / out))
        assert "check its weights" in sentence(caught.value)


def test_a_tenth_of_the_rate_is_in_the_technique_that_sets_it(pupil: Model, lessons: Path) -> None:
    from tuning import around

    from fivefold.study.forecast import forecast

    for recipe, wanted in (("lora", "lora(rate=5e-05)"), ("full(rate=0.02)", "full(rate=0.002)"),
                           ("full + adamw8bit", "full + adamw8bit(rate=5e-06)"),
                           ("mezo", "mezo(rate=1e-07)"), ("checkpoint_activations",
                                                          "checkpoint_activations + full(rate=5e-06)")):
        request = asked(pupil, lessons, Path("nowhere"), recipe=recipe)
        found = forecast(Recipe.parse(recipe), around(request))
        assert slower(around(request).model, found) == wanted


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [600, 20_000])
def test_a_disk_that_fills_up(
    pupil: Model, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    request = asked(pupil, lessons, tmp_path / "out")
    with checkpoints(monkeypatch):
        train(asked(pupil, lessons, tmp_path / "whole"))
        interrupted(request, 6)
        before = (tmp_path / "out" / STATE).read_bytes()
        with no_file_above(size), pytest.raises(StoreError, match="free space") as caught:
            train(request)
        sentence(caught.value)
        assert (tmp_path / "out" / STATE).read_bytes() == before
        assert not list((tmp_path / "out").rglob("*.partial"))
        train(request)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_disk_that_fills_up_at_the_end(
    pupil: Model, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fivefold.study import sealed

    request, judge = asked(pupil, lessons, tmp_path / "out"), sealed.judge
    with no_file_above(1 << 40):
        def full(*given: Any) -> Any:
            found = judge(*given)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return found

        monkeypatch.setattr(sealed, "judge", full)
        with pytest.raises(StoreError, match="free space"):
            train(request)
    monkeypatch.setattr(sealed, "judge", judge)
    assert not (tmp_path / "out" / "model").exists()
    assert heard(request)[1][0].resumed == 12


@pytest.mark.parametrize(("budget", "name"), [("energy<=30J", "energy"), ("money<=$0.0001", "money"),
                                              ("time<=4s", "time")])
def test_a_limit_that_is_used_up_ends_the_run_with_what_it_has(
    pupil: Model, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str, name: str
) -> None:
    from fivefold.study import watch

    monkeypatch.setattr(watch.Watch, "enough", enough_after(3, watch.Watch.enough))
    limit = TrainingBudget.parse(budget)
    done = train(Request(model=pupil, data=lessons, out=tmp_path / "out", budget=limit, recipe=RECIPE,
                         tokens_per_step=256, epochs=3.0))
    assert done.stopped.startswith(f"the {name} of") and done.steps > 0 and done.after <= done.before
    assert (tmp_path / "out" / "model" / "card.json").is_file()


def test_a_limit_that_is_over_at_once_leaves_one_step(
    pupil: Model, lessons: Path, tmp_path: Path
) -> None:
    done = train(Request(model=pupil, data=lessons, out=tmp_path / "out", budget=TrainingBudget(time=0.05),
                         recipe=RECIPE, tokens_per_step=256))
    assert done.steps == len(lines(done.folder)) == 1 and done.after <= done.before


def test_energy_that_is_reached_in_time_is_named(pupil: Model, lessons: Path, tmp_path: Path) -> None:
    from fivefold.study.watch import Watch

    chosen = Forecast(recipe=Recipe.parse("lora"), plan=TrainPlan(seconds=5.0), needs=None)
    with metered() as window, Watch(
        log=tmp_path / "log", budget=TrainingBudget(energy=1e6), chosen=chosen, window=window, before=None, tokens=1.0,
        begun=(0, 0.0), reserve={"time": 0.0, "energy": 0.0, "money": 0.0}, first="energy", listen=lambda told: None,
    ) as watch:
        for number, seconds in enumerate((2.0, 4.0), start=1):
            watch(Step(step=number, steps=9, loss=1.0, norm=1.0, rate=1.0, seconds=seconds))
            assert watch.enough() == ""
        watch(Step(step=3, steps=9, loss=1.0, norm=1.0, rate=1.0, seconds=6.0))
        assert watch.enough() == "the energy of 278 Wh is used up, all cores taken as busy"


def enough_after(steps: int, real: Any) -> Any:
    """The limits as if each step took 100 s."""
    from fivefold.quantity import Quantity

    def enough(self: Any) -> str:
        count = self.__dict__.setdefault("count", 0)
        self.count = count + 1
        taken = self.window.so_far()
        if count >= steps:
            grown = {n: Quantity(value=1e9, unit=q.unit, method="measured") for n, q in taken.quantities().items()}
            self.window = type("Window", (), {"so_far": lambda s: type(taken)(**grown)})()
        return str(real(self))

    return enough
