"""Times made up from known costs are taken apart again; tables are remembered; the real engine gives real times."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fivefold.engines import _type_speed as ts
from fivefold.engines import _type_timing as tt
from fivefold.engines._synthetic import Design, Shape, kind_for
from fivefold.engines._type_speed import TypeSpeeds
from fivefold.engines._type_timing import Arm
from fivefold.model import Blueprint
from fivefold.weights import gguf_header

MIXED = Shape(width=576, heads=9, kv_heads=3, head_dim=64, ffn=1536)
TINY = Shape(width=64, heads=2, kv_heads=1, head_dim=32, ffn=256)
BLUEPRINT = Blueprint(family="llama", layers=30, width=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152,
                      context=2048, tied=True)
TRUE = {t: (2 + i) * 1e-11 for i, t in enumerate(tt.TYPES)}
LAYER, ATTENDED = 6e-5, 4e-11
HEAD, PREFILL, ONE_THREAD = 1.5, 0.3, 1.8


class Made:
    """A session whose clock advances by known costs, counted matrix by matrix."""

    def __init__(self, arm: Arm, clock: list[float]) -> None:
        self.arm, self.clock, self.closed = arm, clock, False

    def generate(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        d, slower = self.arm.design, ONE_THREAD if self.arm.threads == 1 else 1.0
        costs = {name: n * m * TRUE[kind_for(d.kind, m)] for name, (n, m) in d.shape.matrices().items()}
        read = d.layers * sum(costs.values())
        last = sum(cost for name, cost in costs.items() if name not in ("attn_q", "attn_k", "attn_v"))
        head = d.vocab * d.shape.width * HEAD * TRUE[kind_for(d.head, d.shape.width)]
        self.clock[0] += slower * (len(prompt) * PREFILL * (read - last) + head)
        yield 0
        for i in range(max_tokens - 1):
            attention = ATTENDED * (len(prompt) + i) * d.shape.heads * d.shape.head_dim
            self.clock[0] += slower * (d.layers * (LAYER + attention) + read + head)
            yield 0

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def recovered(monkeypatch: pytest.MonkeyPatch) -> TypeSpeeds:
    monkeypatch.setattr(tt, "default_threads", lambda: 2)
    monkeypatch.setattr(tt, "usable_cores", lambda: 2)
    clock, opened = [0.0], []

    def opener(arm: Arm, folder: Path) -> Made:
        opened.append(Made(arm, clock))
        return opened[-1]

    found = tt.measure(MIXED, opener=opener, clock=lambda: clock[0])
    assert all(session.closed for session in opened)
    return found


def test_known_costs_are_recovered(recovered: TypeSpeeds) -> None:
    assert set(recovered.decode) == set(tt.TYPES)
    for kind, seconds in TRUE.items():
        assert recovered.decode[kind] == pytest.approx(seconds, rel=1e-3)
        assert recovered.prefill[kind] == pytest.approx(PREFILL * seconds, rel=1e-3)
    assert set(recovered.head) == {t for t in tt.TYPES if kind_for(t, 576) == t}, "K types do not hold rows of 576"
    assert all(recovered.head[t] == pytest.approx(HEAD * TRUE[t], rel=1e-3) for t in recovered.head)
    assert recovered.base == pytest.approx({"layer": LAYER, "attended": ATTENDED}, rel=1e-2)
    assert recovered.scale[1] == pytest.approx((ONE_THREAD, ONE_THREAD))


def test_times_of_another_mixture_follow(recovered: TypeSpeeds) -> None:
    weights, head = {"q8_0": 6e7, "q5_0": 3e7, "q4_k": 1e7}, {"q5_1": 2.8e7}
    read = sum(TRUE[t] * n for t, n in weights.items())
    tip = HEAD * TRUE["q5_1"] * 2.8e7
    token = 30 * (LAYER + ATTENDED * 200 * 576) + read + tip
    said = {"weights": weights, "head": head}
    assert recovered.token_seconds(layers=30, position=200, units=576, **said) == pytest.approx(token, rel=1e-3)
    one = recovered.token_seconds(layers=30, position=200, units=576, threads=1, **said)
    assert one == pytest.approx(ONE_THREAD * token, rel=1e-3)
    prompt = 150 * PREFILL * read * 29.2 / 30 + tip
    assert recovered.prompt_seconds(layers=30, tail=0.8, prompt=150, **said) == pytest.approx(prompt, rel=1e-3)


def test_a_type_that_was_not_measured_lies_between_its_neighbours() -> None:
    table = {"q4_0": 4.0, "q5_0": 8.0, "q8_0": 9.0, "f16": 10.0}
    assert ts.per_weight(table, "q4_1") == pytest.approx(6.0), "5 bits lie half-way between 4.5 and 5.5"
    assert ts.per_weight(table, "q4_k") == 4.0 and ts.per_weight(table, "f32") == pytest.approx(20.0)
    assert ts.per_weight(table, "q2_k") == pytest.approx(4.0 * 2.625 / 4.5)


def test_a_table_is_measured_once_and_remembered(
    recovered: TypeSpeeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path))
    calls: list[Shape] = []
    monkeypatch.setattr(tt, "measure", lambda shape: calls.append(shape) or recovered)
    assert ts.known(BLUEPRINT) is None and not calls
    assert ts.measured(BLUEPRINT) == recovered == ts.measured(BLUEPRINT) == ts.known(BLUEPRINT)
    assert calls == [MIXED] and ts.known(BLUEPRINT).digest == recovered.digest  # type: ignore[union-attr]
    assert ts.known(replace(BLUEPRINT, layers=3)) == recovered, "depth is not in the table"
    assert ts.known(replace(BLUEPRINT, ffn=2048)) is None and ts.known(BLUEPRINT, "another machine") is None
    [file] = (tmp_path / "type_speed").glob("*.json")
    file.write_text(file.read_text()[:100])
    assert ts.measured(BLUEPRINT) == recovered and len(calls) == 2
    assert replace(recovered, others=0.2).digest != recovered.digest


def test_a_busy_machine_is_left_for_later_and_a_rough_table_measured_again(
    recovered: TypeSpeeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path))
    busy, noise = [0.9], [0.5]

    class Window:
        def __enter__(self) -> Window:
            return self

        def __exit__(self, *error: object) -> None:
            self.share = busy[0]

    monkeypatch.setattr("fivefold.machine.Neighbours", Window)
    monkeypatch.setattr("fivefold.machine.GLANCE", 0.0)
    monkeypatch.setattr(tt, "measure", lambda shape: replace(recovered, others=noise[0]))
    assert ts.settle(BLUEPRINT) is None and ts.known(BLUEPRINT) is None
    busy[0] = 0.0
    assert ts.settle(BLUEPRINT) == replace(recovered, others=0.5)
    noise[0] = 0.1
    assert ts.measured(BLUEPRINT).others == 0.5, "a choice keeps to the table it was made from"
    assert ts.settle(BLUEPRINT) == replace(recovered, others=0.1) == ts.known(BLUEPRINT)
    noise[0] = 0.0
    assert ts.settle(BLUEPRINT).others == 0.1  # type: ignore[union-attr]


def test_disturbed_rounds_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.9, 0.0, 0.5, 0.0, 0.1])

    class Window:
        share = 0.0

        def __enter__(self) -> Window:
            return self

        def __exit__(self, *error: object) -> None:
            self.share = next(shares)

    monkeypatch.setattr(tt, "Neighbours", Window)
    values = iter([[9.0], [1.0], [8.0], [3.0], [2.0]])
    order: list[bool] = []
    found, others = tt._rounds(lambda backwards: order.append(backwards) or next(values), 3)
    assert found == [2.0] and others == 0.1 and order == [False, True, False, True, False]


def test_the_file_holds_what_the_design_says(tmp_path: Path) -> None:
    for kind in ("iq4_nl", "q4_k"):
        design = Design(shape=TINY, layers=2, kind=kind, head="q5_0", vocab=96)
        tensors = {t.name: t for t in gguf_header(design.write(tmp_path / f"{kind}.gguf")).tensors}
        stored: dict[str, int] = {}
        for name, tensor in tensors.items():
            if name.startswith("blk.") and len(tensor.shape) == 2:
                stored[tensor.type.lower()] = stored.get(tensor.type.lower(), 0) + math.prod(tensor.shape)
        assert stored == dict(design.weights())
        assert tensors["token_embd.weight"].type == "Q5_0"
        assert tensors["blk.1.ffn_down.weight"].type == kind.upper() and len(tensors) == 2 + 2 * 9


def test_large_widths_are_halved_and_keep_their_types() -> None:
    large = replace(BLUEPRINT, width=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672)
    shape = Shape.of(large)
    assert shape.layer < 1 << 27 and shape.width % 256 == shape.ffn % 256 == shape.units % 256 == 0
    assert Shape.of(BLUEPRINT) == MIXED


def test_the_real_engine_gives_positive_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tt, "WEIGHTS", 400_000)
    monkeypatch.setattr(tt, "HEAD_WEIGHTS", 60_000)
    monkeypatch.setattr(tt, "ROUNDS", 1)
    monkeypatch.setattr(tt, "PREFILL_ROUNDS", 1)
    found = tt.measure(TINY, types=("q8_0", "q4_0", "q4_k"))
    numbers = [*found.decode.values(), *found.head.values(), *found.prefill.values()]
    assert set(found.decode) == {"q8_0", "q4_0", "q4_k"} and set(found.head) == {"q8_0", "q4_0"}
    assert all(math.isfinite(x) and x > 0 for x in numbers)
    assert all(math.isfinite(x) and x >= 0 for x in found.base.values())
    assert TypeSpeeds.from_json(found.to_json()) == found


def test_the_last_layer_reads_a_prompt_with_q_k_v_only() -> None:
    design = Design(shape=MIXED, layers=3, kind="q8_0")
    qkv = 576 * 576 + 2 * 192 * 576
    assert design.weights(prompt=True).total() == 2 * MIXED.layer + qkv
    assert MIXED.tail == pytest.approx(1 - qkv / MIXED.layer)
