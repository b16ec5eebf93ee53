"""Forecasts: parts, limits, refusals and the choice."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tuning import PRICES, around, asked, machine

from fivefold.budget import TrainingBudget
from fivefold.errors import Infeasible
from fivefold.model import Model, Trait, load
from fivefold.quantity import Quantity
from fivefold.recipe import Recipe
from fivefold.study.forecast import LEAST_STEPS, Forecast, choose, forecast, ways
from fivefold.study.resident import Added
from fivefold.study.surroundings import REACHED, Steps
from fivefold.study.train import JUDGING, LEAST_ITEMS, affordable, prepared
from fivefold.testing import tiny_model
from fivefold.testing.contract import sentence
from fivefold.testing.tiny import tiny_examples
from fivefold.training.batching import Stream
from fivefold.training.method import model_shapes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(tiny_model(tmp_path_factory.mktemp("tiny") / "model", layers=2, vocab=257, context=256).path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_examples(tmp_path_factory.mktemp("data") / "rows.jsonl", 400)


def one(model: Model, data: Path, recipe: str, budget: str = "", given: dict[str, Any] | None = None,
        **more: Any) -> Forecast:
    request = asked(model, data, Path("nowhere"), budget, **{"steps": 0, "recipe": recipe, **more})
    return forecast(Recipe.parse(recipe), around(request, **(given or {})))


def test_memory_is_the_sum_of_its_parts(tiny: Model, data: Path) -> None:
    for recipe, process in (("full", 100e6), ("lora", 150e6), ("qlora", 150e6), ("bitfit", 100e6), ("mezo", 100e6)):
        need = one(tiny, data, recipe).needs
        assert need is not None and need.process == process
        parts = (need.process, need.weights, need.beside, need.gradients, need.waiting, need.state, need.activations,
                 need.head)
        assert need.peak == pytest.approx(max(sum(parts) + need.slack, need.loading))


def test_numbers_trained_are_counted(tiny: Model, data: Path) -> None:
    assert one(tiny, data, "full").trained == sum(math.prod(s) for s in model_shapes(tiny.blueprint).values())
    assert one(tiny, data, "lora(rank=1)").trained == sum(
        sum(s) for n, s in model_shapes(tiny.blueprint).items() if n.startswith("layer") and len(s) == 2)


def test_time_is_the_arithmetic_over_the_rate(tiny: Model, data: Path) -> None:
    request = asked(tiny, data, Path("nowhere"), steps=0, tokens_per_step=512)
    given = around(request)
    stream = Stream(given.examples.rows, 512, 1 << 40, 0)
    steps, b = stream.epoch(0), tiny.blueprint
    positions = sum(map(len, steps)) * stream.length / len(steps)
    learned = sum(int(row.learn[1:].sum()) for row in given.examples.rows) / len(steps)
    head = b.vocab * b.width
    attention = 4 * b.layers * b.heads * b.head_dim * stream.length / 2
    each = positions * (2 * (b.matrix_parameters - head) + attention) + learned * 2 * head
    for recipe, passes in (("full", 3), ("lora", 2), ("lora + checkpoint_activations", 3),
                           ("full + checkpoint_activations(layers=0.5)", 3.5), ("mezo", 2)):
        found = forecast(Recipe.parse(recipe), given)
        assert found.per_step == pytest.approx(passes * each / (REACHED * 10e9))
        judging = 2 * given.exam.tokens * 2 * b.matrix_parameters / (REACHED * 10e9)
        assert found.seconds == pytest.approx(len(steps) * found.per_step + judging)
        watts = found.joules / found.seconds
        assert found.usd == pytest.approx(found.seconds * 2 * 1.8 / 3600 + found.joules / 3.6e6 * 0.36) and watts > 1
    assert forecast(Recipe.parse("lora"), around(request, dtype="bfloat16")).per_step == pytest.approx(each / (
        REACHED * 10e9))


def test_rounds_and_steps_are_as_asked(tiny: Model, data: Path) -> None:
    one_round, three = one(tiny, data, "lora"), one(tiny, data, "lora", epochs=3.0)
    request = asked(tiny, data, Path("nowhere"), steps=0)
    per_round = len(Stream(around(request).examples.rows, 256, 1 << 40).epoch(0))
    assert three.seconds - one_round.seconds == pytest.approx(2 * per_round * one_round.per_step)
    twelve, twentyfour = (one(tiny, data, "lora", steps=n) for n in (12, 24))
    assert twentyfour.seconds - twelve.seconds == pytest.approx(12 * twelve.per_step)


def test_a_time_limit_shortens_the_run(tiny: Model, data: Path) -> None:
    free = one(tiny, data, "lora", epochs=50.0)
    half = one(tiny, data, "lora", f"time<={free.seconds / 2!r}s", epochs=50.0)
    assert not half.why_not and free.plan.seconds == 0
    assert free.seconds / 2 - half.per_step <= half.seconds <= free.seconds / 2
    judging = around(asked(tiny, data, Path("nowhere"))).judging_seconds()
    assert half.plan.seconds == pytest.approx(free.seconds / 2 - judging)
    given = one(tiny, data, "lora", f"time<={free.seconds / 2!r}s", steps=10**6)
    assert given.seconds == half.seconds, "steps that were asked for are no exception"


def test_judging_takes_a_part_of_a_limit_and_fewer_rows(tiny: Model, tmp_path: Path) -> None:
    data = tiny_examples(tmp_path / "many.jsonl", 1200)
    whole = around(asked(tiny, data, Path("nowhere"), items=100))
    assert len(whole.exam.rows) > 2 * LEAST_ITEMS
    for share, most in ((2.0, len(whole.exam.rows)), (0.7, 0.7 * len(whole.exam.rows)), (0.0, LEAST_ITEMS)):
        limit = share * whole.judging_seconds() / JUDGING
        request = asked(tiny, data, Path("nowhere"), f"time<={limit!r}s", items=100)
        given = around(request)
        found = affordable(request, given, prepared(request)[1][1])
        assert most - 1 <= len(found.exam.rows) <= most
        if share == 0.7:
            assert found.judging_seconds() == pytest.approx(JUDGING * limit, rel=0.1)


@pytest.mark.parametrize("name", ["energy", "money"])
def test_energy_and_money_are_time_in_other_units(tiny: Model, data: Path, name: str) -> None:
    free = one(tiny, data, "lora", epochs=50.0)
    whole = {"energy": free.joules, "money": free.usd}[name]
    unit = {"energy": "J", "money": "$"}[name]
    limit = f"money<=${whole / 2!r}" if unit == "$" else f"energy<={whole / 2!r}J"
    half = one(tiny, data, "lora", limit, epochs=50.0)
    same = one(tiny, data, "lora", f"time<={free.seconds / 2!r}s", epochs=50.0)
    assert not half.why_not and half.plan.seconds == pytest.approx(same.plan.seconds, rel=1e-6)
    assert {"energy": half.joules, "money": half.usd}[name] <= whole / 2


def test_the_least_of_several_limits_counts(tiny: Model, data: Path) -> None:
    free = one(tiny, data, "lora", epochs=50.0)
    found = one(tiny, data, "lora", f"time<={free.seconds!r}s, energy<={free.joules / 4!r}J, money<=$9", epochs=50.0)
    assert found.joules <= free.joules / 4 and found.seconds > free.seconds / 5


def test_a_machine_that_costs_nothing_has_no_limit_of_money(tiny: Model, data: Path) -> None:
    given = {"prices": replace(PRICES, electricity_usd_per_kwh=0.0, core_hour_usd=0.0)}
    found = one(tiny, data, "lora", "money<=$0.01", given)
    assert not found.why_not and found.usd == 0 and found.plan.seconds == 0


def test_few_examples_are_no_reason_to_refuse(tiny: Model, tmp_path: Path) -> None:
    few = tiny_examples(tmp_path / "few.jsonl", 20)
    found = one(tiny, few, "lora", "time<=1min", tokens_per_step=1024)
    assert not found.why_not and found.seconds < 60


def test_too_little_time_is_refused_with_what_it_takes(tiny: Model, data: Path) -> None:
    free = one(tiny, data, "full", epochs=50.0)
    for limit in (f"time<={5 * free.per_step!r}s", "time<=0s", "energy<=1mJ", "money<=$1e-12"):
        found = one(tiny, data, "full", limit, epochs=50.0)
        assert f"for {LEAST_STEPS} steps, judging included" in found.why_not
        assert found.refused == limit.partition("<")[0]
    with pytest.raises(Infeasible, match=r"full does not fit time<=.*; allow more time") as caught:
        choose([one(tiny, data, "full", "time<=0s")], TrainingBudget(time=0.0))
    sentence(caught.value)


def test_a_refusal_names_the_largest_part(tiny: Model, data: Path) -> None:
    assert "the largest part is the process itself (100 MB)" in one(tiny, data, "full", "memory<=50MB").why_not
    small = {"process": lambda libraries: Added(1e5, 1e5)}
    for recipe, shape, part in (
        ("full", {"layers": 400}, "activations"),
        ('full(averages="float32")', {"ffn": 100_000, "width": 256}, "optimiser state"),
        ("lora", {"vocab": 200_000, "width": 512}, "reading the weights"),
        ("diff_pruning", {"ffn": 100_000, "width": 256}, "optimiser state"), ("lora", {"layers": 400}, "activations"),
    ):
        found = one(tiny.but(blueprint=replace(tiny.blueprint, **shape)), data, recipe, "memory<=200kB", small)
        assert found.refused == "memory" and f"the largest part is {part} (" in found.why_not, found.why_not
    wide = tiny.but(blueprint=replace(tiny.blueprint, width=4096, ffn=4096))
    assert "part is the weights (" in one(wide, data, "lomo", "memory<=200kB", {**small, "same": True}).why_not


def test_fewer_positions_at_once_before_a_way_is_refused(tiny: Model, data: Path) -> None:
    wide = tiny.but(blueprint=replace(tiny.blueprint, layers=200))
    sizes = {}
    for at_once in (1024, 512, 256):
        request = asked(wide, data, Path("nowhere"), recipe="lora", tokens_per_step=at_once, steps=0)
        sizes[at_once] = forecast(Recipe.parse("lora"), around(request)).needs
    peaks = [sizes[n].peak for n in (256, 512, 1024)]  # type: ignore[union-attr]
    assert peaks == sorted(peaks) and peaks[0] < peaks[1] < peaks[2]
    for room, wanted in ((peaks[2] + 1, 1024), ((peaks[1] + peaks[2]) / 2, 512), ((peaks[0] + peaks[1]) / 2, 256)):
        found = one(wide, data, "lora", f"memory<={room!r}B", tokens_per_step=1024)
        assert (found.plan.at_once, found.why_not) == (wanted, "")
    small = one(wide, data, "lora", f"memory<={peaks[0] - 1!r}B", tokens_per_step=1024)
    assert small.refused == "memory" and small.plan.at_once == 256
    assert one(wide, data, "full", f"memory<={peaks[0]!r}B", tokens_per_step=1024).plan.at_once == 1024, "it is fused"
    assert one(wide, data, "mezo", "memory<=1MB", tokens_per_step=1024).plan.at_once == 256


def test_judging_must_fit_too(tiny: Model, data: Path) -> None:
    given = {"dtype": "bfloat16", "stored": 2, "same": True, "process": lambda libraries: Added(1e5, 1e5)}
    found = one(tiny, data, "bitfit", given=given)
    assert found.needs is not None
    longest = around(asked(tiny, data, Path("nowhere"))).exam.longest
    assert found.judging == 1e5 + 4 * tiny.blueprint.parameters + 4 * 257 * 3 * longest
    wide = tiny.but(blueprint=replace(tiny.blueprint, vocab=1_000_000))
    found = one(wide, data, "bitfit", given=given)
    assert found.needs is not None and found.needs.peak < found.judging == found.most
    limit = f"memory<={(found.needs.peak + found.judging) / 2!r}B"
    tight = one(wide, data, "bitfit", limit, given)
    assert tight.refused == "memory" and "judging the model where it is served needs" in tight.why_not


def test_a_prefix_leaves_fewer_places(tiny: Model, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text('{"prompt": "%s", "completion": "b"}\n{"prompt": "a", "completion": "b"}\n' % ("x" * 240))
    assert not one(tiny, file, "prefix(tokens=4)").why_not
    found = one(tiny, file, "prefix(tokens=32)")
    assert found.refused == "model" and "leaves 224 places" in found.why_not


def test_what_does_not_fit_the_model_says_so(tiny: Model, data: Path) -> None:
    request = asked(tiny, data, Path("nowhere"), recipe="lora")
    fitted = replace(around(request), model=around(request).model.without(Trait.UNFITTED))
    found = forecast(Recipe.parse("lora"), fitted)
    assert found.refused == "model" and found.needs is None and "lora needs weights not yet fitted" in found.why_not


def test_every_way_is_forecast_on_every_family(tmp_path: Path, data: Path) -> None:
    for family in ("llama", "qwen2", "gpt2"):
        model = load(tiny_model(tmp_path / family, family, layers=2, vocab=257, context=256).path)
        given = around(asked(model, data, Path("nowhere"), recipe="", steps=0))
        for recipe in ways():
            found = forecast(recipe, given)
            assert not found.why_not, f"{recipe} on {family}: {found.why_not}"
            assert found.needs is not None and 100e6 < found.needs.peak < 300e6 and found.seconds > 0


def test_the_machine_needs_no_rate_in_bfloat16(tiny: Model, data: Path) -> None:
    plain = replace(machine(), rates={"gemm.float32": Quantity(value=10e9, unit="FLOP/s", method="measured")})
    one_, two = (one(tiny, data, "lora", given={"machine": plain, "dtype": d}) for d in ("float32", "bfloat16"))
    assert one_.per_step == two.per_step


def test_the_most_that_is_learned_at_once(tiny: Model, data: Path) -> None:
    given = around(asked(tiny, data, Path("nowhere"), steps=0, tokens_per_step=1024))
    stream = Stream(given.examples.rows, 1024, 512, 0)
    steps = Steps.of(given.stream(replace(given.model.train, tokens_per_step=1024)), 512)
    seen = [batch.learned for n in range(steps.number) for batch in stream.step(n)]
    assert steps.learned_at_once == max(seen) and steps.number == len(stream.epoch(0))
    assert steps.learned * steps.number == sum(seen)
