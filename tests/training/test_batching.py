"""Batches: each example once a round, nothing leaks, and the same step is the same batches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import alone, examples, gradients, module

from fivefold.training.batching import IGNORE, Batch, Layout, Stream, visible
from fivefold.training.data import Example
from fivefold.training.module import loss_of
from fivefold.training.run import _micro

LAYOUTS: tuple[Layout, ...] = ("pack", "bucket")


def parts(batch: Batch) -> list[tuple[int, ...]]:
    """The tokens of each example in a batch; checks that all else of the batch says the same."""
    found = []
    for i in range(len(batch.tokens)):
        if batch.segments is None:
            length = len(np.trim_zeros(batch.tokens[i], "b"))
            places = [np.arange(length)]
        else:
            places = [np.flatnonzero(batch.segments[i] == k) for k in range(1, batch.segments[i].max() + 1)]
        for place in places:
            np.testing.assert_array_equal(place, np.arange(place[0], place[-1] + 1))
            np.testing.assert_array_equal(batch.positions[i, place], np.arange(len(place)))
            assert batch.targets[i, place[-1]] == IGNORE, "the last token has no next one"
            follows = batch.targets[i, place[:-1]]
            assert (np.isin(follows, [IGNORE]) | (follows == batch.tokens[i, place[1:]])).all()
            found.append(tuple(batch.tokens[i, place].tolist()))
        empty = np.ones(batch.tokens.shape[1], bool)
        empty[np.concatenate(places)] = False
        assert (batch.targets[i, empty] == IGNORE).all() and (batch.tokens[i, empty] == 0).all()
    assert len(found) == batch.examples
    return found


@settings(max_examples=60, deadline=None)
@given(layout=st.sampled_from(LAYOUTS), count=st.integers(1, 60), longest=st.integers(2, 120),
       per_step=st.integers(16, 2000), at_once=st.integers(16, 600), seed=st.integers(0, 3))
def test_every_round_holds_every_example_once_within_the_limits(
    layout: Layout, count: int, longest: int, per_step: int, at_once: int, seed: int
) -> None:
    rows = examples(count, 2, longest, seed=seed)
    stream = Stream(rows, per_step, at_once, seed, layout)
    wanted = Counter(tuple(row.tokens.tolist()) for row in rows)
    learned = sum(int(row.learn[1:].sum()) for row in rows)
    first = 0
    for number in range(2):
        steps = [stream.step(first + i) for i in range(len(stream.epoch(number)))]
        first += len(steps)
        batches = [batch for step in steps for batch in step]
        assert Counter(part for batch in batches for part in parts(batch)) == wanted
        assert sum(batch.learned for batch in batches) == learned
        for batch in batches:
            assert len(batch.tokens) == 1 or batch.tokens.size <= at_once
        for step in steps:
            held = [part for batch in step for part in parts(batch)]
            assert len(held) == 1 or sum(map(len, held)) <= max(per_step, stream.length)
            if layout == "pack":
                assert {batch.tokens.shape[1] for batch in step} == {stream.length}
            else:
                assert max(batch.tokens.shape[1] for batch in step) <= stream.longest
    scored = stream.batches()
    assert Counter(part for batch in scored for part in parts(batch)) == wanted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_a_function_of_its_number(layout: Layout) -> None:
    rows = examples(40, 5, 60)

    def seen(stream: Stream, numbers: list[int]) -> dict[int, Any]:
        return {n: [batch.tokens.tolist() for batch in stream.step(n)] for n in numbers}

    there = seen(Stream(rows, 200, 100, 7, layout), list(range(60)))
    assert seen(Stream(rows, 200, 100, 7, layout), [59, 3, 30, 0]) == {n: there[n] for n in (59, 3, 30, 0)}
    assert seen(Stream(rows, 200, 100, 8, layout), list(range(60))) != there
    per_round = len(Stream(rows, 200, 100, 7, layout).epoch(0))
    assert [there[n] for n in range(per_round)] != [there[n] for n in range(per_round, 2 * per_round)]


def test_a_late_step_makes_each_round_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = examples(4, 20, 30)
    made: list[int] = []
    draw = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed[1]) or draw(seed))
    stream = Stream(rows, 64, 64)
    for number in (400, 401, 402):
        stream.step(number)
    assert len(made) > 100 and len(made) <= len(set(made)) + 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_losses_and_gradients_are_those_of_the_examples_alone(layout: Layout, family: str) -> None:
    rows = examples(30, 5, 90)
    model = module(family).eval()
    own = {tuple(row.tokens.tolist()): row for row in rows}
    loss = loss_of(model)
    stream = Stream(rows, 256, 128, 1, layout)
    batches = stream.step(0) + stream.batches()
    assert max(batch.examples for batch in batches) > 2
    for batch in batches:
        with torch.no_grad():
            sums, counts = zip(*(alone(model, own[part]) for part in parts(batch)), strict=True)
            assert float(loss(batch)) == pytest.approx(float(sum(sums)) / sum(counts), abs=1e-5)
        assert batch.learned == sum(counts)
    batch = max(batches, key=lambda batch: batch.examples)
    ours = gradients(model, loss(batch))
    sums, counts = zip(*(alone(model, own[part]) for part in parts(batch)), strict=True)
    theirs = gradients(model, sum(sums) / sum(counts))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_other_examples_in_a_row_change_nothing() -> None:
    model = module("Llama").eval()
    first, *others = examples(7, 20, 30)
    changed = [Example((row.tokens % 96) + 1, row.learn, row.line, row.digest) for row in others]
    logits = []
    for rest in (others, changed):
        batch = Stream([first, *rest], 512, 512).batches()[0]
        row, place = next(
            (i, at) for i in range(len(batch.tokens)) for k in range(1, batch.segments[i].max() + 1)
            if np.array_equal(batch.tokens[i, at := np.flatnonzero(batch.segments[i] == k)], first.tokens)
        )
        hide = torch.zeros(visible(batch).shape).masked_fill(~torch.from_numpy(visible(batch)), -torch.inf)
        with torch.no_grad():
            out = model(torch.from_numpy(batch.tokens), attention_mask=hide,
                        position_ids=torch.from_numpy(batch.positions)).logits[row, place]
        logits.append(out)
    assert torch.equal(*logits)


def test_a_context_that_is_no_multiple_is_not_left() -> None:
    rows = examples(9, 30, 50)
    model = module("GPT2").eval()
    model.transformer.wpe = torch.nn.Embedding(max(len(row.tokens) for row in rows), 32)
    for layout in LAYOUTS:
        for batch in Stream(rows, 128, 128, 0, layout).batches():
            assert torch.isfinite(loss_of(model)(batch))


def test_shares_are_of_the_learned_tokens() -> None:
    rows = examples(20, 10, 60)
    stream = Stream(rows, 512, 100)
    micro = _micro(stream.step(0))
    assert len(micro) > 1 and sum(share for _, share in micro) == pytest.approx(1)
    model = module("Llama").eval()
    loss, own = loss_of(model), {tuple(row.tokens.tolist()): row for row in rows}
    with torch.no_grad():
        sums, counts = zip(*(alone(model, own[p]) for batch, _ in micro for p in parts(batch)), strict=True)
        together = sum(float(loss(batch)) * share for batch, share in micro)
    assert together == pytest.approx(float(sum(sums)) / sum(counts), abs=1e-5)
