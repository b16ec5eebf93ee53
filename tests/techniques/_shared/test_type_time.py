"""Shares of decode time by hand, and the least share against every combination."""

from __future__ import annotations

import itertools

import pytest

from fivefold.engines._type_speed import TypeSpeeds
from fivefold.techniques._shared.gguf_types import bits
from fivefold.techniques._shared.type_time import least, shares

SPEEDS = TypeSpeeds(
    threads=2, decode={"q8_0": 4.0, "q5_0": 6.0, "iq4_nl": 3.0}, head={"q8_0": 2.0, "q5_0": 5.0, "iq4_nl": 1.0},
    prefill={"q8_0": 1.0}, base={},
)
SHAPES = {"token_embd.weight": (10, 32), "blk.0.attn_q.weight": (20, 32)}
TYPES = dict.fromkeys(SHAPES, ("iq4_nl", "q5_0", "q8_0"))


def test_shares_by_hand() -> None:
    found = shares(SHAPES, TYPES, SPEEDS)
    whole = 20 * 4.0 + 10 * 2.0
    assert found["blk.0.attn_q.weight"]["q5_0"] == pytest.approx(20 * 6.0 / whole)
    assert found["token_embd.weight"]["iq4_nl"] == pytest.approx(10 * 1.0 / whole)


def test_an_embedding_that_is_only_looked_up_costs_no_time() -> None:
    untied = {**SHAPES, "output.weight": (10, 32)}
    found = shares(untied, {**TYPES, "output.weight": ("q8_0",)}, SPEEDS)
    assert found["token_embd.weight"]["q5_0"] == 0.0
    assert found["output.weight"]["q8_0"] == pytest.approx(0.2)


@pytest.mark.parametrize("average", [4.6, 6.0, 8.5])
def test_no_choice_is_faster_than_the_least(average: float) -> None:
    shapes = {f"blk.{i}.attn_q.weight": (20, 32) for i in range(5)} | {"token_embd.weight": (40, 32)}
    types = dict.fromkeys(shapes, ("q5_0", "q8_0", "iq4_nl"))
    slow = TypeSpeeds(threads=2, decode={"q8_0": 4.0, "q5_0": 5.0, "iq4_nl": 6.0}, prefill={}, base={},
                      head={"q8_0": 2.0, "q5_0": 3.0, "iq4_nl": 4.0})
    share = shares(shapes, types, slow)
    weights = sum(r * c for r, c in shapes.values())
    reached = [
        sum(share[n][k] for n, k in zip(shapes, kinds, strict=True))
        for kinds in itertools.product(("q5_0", "q8_0", "iq4_nl"), repeat=6)
        if sum(bits(k) * r * c for k, (r, c) in zip(kinds, shapes.values(), strict=True)) <= average * weights
    ]
    bound = least(shapes, types, slow, average)
    assert min(reached) - 0.2 < bound <= min(reached) + 1e-9
