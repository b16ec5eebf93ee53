"""The learning rate over a run, and which windows of a text a step holds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from small import plan

from fivefold.training.loop import rate_at, windows


def test_rate_warms_up_and_falls_by_a_cosine() -> None:
    told = plan(steps=100, warmup=0.1)
    rates = [rate_at(step, told) for step in range(100)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 * (1 + math.cos(math.pi * k / 100)) / 2 for k in range(10)])
    assert rates[50] == pytest.approx(0.5) and rates[-1] < 0.001 and np.argmax(rates) == 9
    assert [rate_at(k, told, 4) for k in range(4)] == [rate_at(k, plan(steps=4)) for k in range(4)]


@pytest.mark.parametrize("at_once", [1, 3, 5])
def test_every_window_comes_once_per_round(at_once: int) -> None:
    tokens = np.arange(64).reshape(16, 4)
    stream = windows(tokens, 5, 3, at_once)
    last = stream(15)
    steps = [stream(number) for number in range(16)]
    seen = np.concatenate([batch for step in steps for batch, _ in step])[:80, 0]
    rounds = [tuple(seen[16 * turn : 16 * (turn + 1)]) for turn in range(5)]
    assert {tuple(sorted(turn)) for turn in rounds} == {tuple(tokens[:, 0])} and len(set(rounds)) == 5
    for micro in steps:
        assert sum(share for _, share in micro) == pytest.approx(1) and all(len(batch) <= at_once for batch, _ in micro)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(last, steps[15], strict=True))
