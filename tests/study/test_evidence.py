"""Corrections: what resembles a trial follows it, the rest less."""

from __future__ import annotations

import math
import random

import pytest

from fivefold.study.evidence import ROUGH, TABLE, Evidence, Traits

Q8 = Traits(engine="llama.cpp", storage="q8_0")
Q4 = Traits(engine="llama.cpp", storage="q4_0")
DRAFT = Traits(engine="llama.cpp", storage="q8_0", lookup="4")
TORCH = Traits(engine="torch", storage="f32")


def test_one_trial_corrects_its_like_most() -> None:
    learnt = Evidence([(Q8, math.log(2))], ROUGH)
    same, near, far = (learnt.log_factor(t) for t in (Q8, Q4, TORCH))
    assert same == pytest.approx(math.log(2), rel=0.01) and same > near > far > 0
    assert [learnt.count(t) for t in (Q8, Q4, TORCH)] == [1, 1, 1]


def test_a_measured_table_is_not_corrected_by_another_engine() -> None:
    learnt = Evidence([(TORCH, 1.0)], TABLE)
    assert learnt.log_factor(Q8) == 0.0 and learnt.count(Q8) == 0


def test_a_trait_keeps_its_own_effect() -> None:
    learnt = Evidence([(Q8, 0.0), (DRAFT, math.log(0.6)), (Q4, 0.0)], TABLE)
    other = Traits(engine="llama.cpp", storage="q4_0", lookup="4")
    assert learnt.log_factor(other) == pytest.approx(math.log(0.6), abs=0.12)
    assert abs(learnt.log_factor(Q4)) < 0.06


def test_equals_the_weighted_mean_of_a_hierarchy() -> None:
    noise = random.Random(0)
    ratios = [0.3 + 0.01 * noise.gauss(0, 1) for _ in range(8)]
    learnt = Evidence([(Q8, r) for r in ratios], ROUGH)
    variance = ROUGH["any"] + ROUGH["engine"] + ROUGH["storage"]
    shrink = variance / (variance + 0.05**2 / 8)
    assert learnt.log_factor(Q8) == pytest.approx(shrink * sum(ratios) / 8), "the textbook posterior mean"
    assert Evidence([], ROUGH).log_factor(Q8) == 0.0
