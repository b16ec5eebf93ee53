"""Weights by type, counted again from the files and plans themselves."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import FFN, LAYERS, VOCAB, WIDTH

from fivefold.engines._synthetic import Design, Shape
from fivefold.model import Model, load
from fivefold.recipe import Recipe
from fivefold.study import type_work
from fivefold.study.type_work import planned_work, spread_work, stored_work
from fivefold.techniques._shared.gguf_types import bits, matrices

MATRICES = LAYERS * (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * FFN)


def test_a_plan_of_one_type(bare: Model) -> None:
    work = planned_work(Recipe.parse('gguf(type="q4_0", embedding="q8_0")').plan(bare))
    assert work.layers == {"q4_0": MATRICES} and work.head == {"q8_0": VOCAB * WIDTH}
    assert sum(r * c for n, (r, c) in matrices(bare).items() if n.startswith("blk.")) == MATRICES


def test_departures_of_a_plan_count(bare: Model) -> None:
    planned = bare.but(export=replace(bare.export, default="q8_0", types={"blk.1.attn_q.weight": "f16"}))
    assert planned_work(planned).layers == {"q8_0": MATRICES - WIDTH * WIDTH, "f16": WIDTH * WIDTH}


def test_a_file_is_counted_by_its_header(tmp_path: Path) -> None:
    design = Design(shape=Shape(width=64, heads=2, kv_heads=1, head_dim=32, ffn=256), layers=2, kind="q4_k")
    work = stored_work(load(design.write(tmp_path / "a.gguf")))
    assert work.layers == dict(design.weights()) and work.head == {"q8_0": 256 * 64}


@pytest.mark.parametrize("average", [4.6, 5.5, 7.2])
def test_a_spread_keeps_the_average_and_the_count(bare: Model, average: float) -> None:
    kinds = {WIDTH: ("iq4_nl", "q5_0", "q5_1", "q8_0"), FFN: ("iq4_nl", "q5_0", "q8_0")}
    work = spread_work(bare.blueprint, average, kinds)
    every = Counter(work.layers)
    for kind, n in work.head.items():
        every[kind] += n  # type: ignore[assignment]
    assert sum(work.layers.values()) == pytest.approx(MATRICES) and sum(every.values()) == pytest.approx(
        MATRICES + VOCAB * WIDTH)
    assert sum(n * bits(t) for t, n in every.items()) / sum(every.values()) == pytest.approx(average, abs=1e-4)
    assert min(every.values()) >= 0


def test_a_need_gets_the_nearest_type() -> None:
    rng, kinds, centre = random.Random(0), ("q8_0", "iq4_nl", "q5_0", "q5_1"), 5.6
    drawn = Counter(min(kinds, key=lambda k: abs(bits(k) - need)) for need in (
        rng.gauss(centre, type_work.SPREAD) for _ in range(20_000)))
    found = type_work._nearest(centre, kinds)
    assert {k: n / 20_000 for k, n in drawn.items()} == pytest.approx(found, abs=0.015)
