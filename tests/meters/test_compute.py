"""Counted operations against the blueprint's formula and brute force; times against a clock of our own."""

import json
from pathlib import Path

import pytest

from fivefold.machine import Machine
from fivefold.meters.compute import (
    Timing,
    count_flops,
    flops,
    gemm_dtype,
    mbu,
    mfu,
    percentiles,
    pooled,
    prefill_flops,
    time_request,
)
from fivefold.model import Blueprint, Model, RunPlan, blueprint_of
from fivefold.quantity import Quantity

CONFIGS = {
    "llama": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 96, "vocab_size": 256, "max_position_embeddings": 128},
    "qwen2": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
              "intermediate_size": 128, "vocab_size": 300, "max_position_embeddings": 128, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 256, "n_positions": 128, "bos_token_id": 0,
             "eos_token_id": 0},
}


def folder_model(tmp_path: Path, family: str) -> Model:
    config = {"model_type": family, **CONFIGS[family]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Model(name=family, path=tmp_path, format="safetensors", blueprint=blueprint_of(config))


@pytest.mark.parametrize("family", CONFIGS)
def test_the_count_of_the_graph_agrees_with_the_formula(tmp_path: Path, family: str) -> None:
    model = folder_model(tmp_path, family)
    for position in (0, 40):
        counted = count_flops(model, position)
        assert counted.reason == "", "the graph must really have been traced"
        assert counted.value == pytest.approx(model.blueprint.flops_per_token(position), rel=0.02)


def test_attention_is_counted(tmp_path: Path) -> None:
    """FlopCounterMode sees no fused attention on a CPU: the growth with position would be nearly 0 then."""
    model = folder_model(tmp_path, "llama")
    grown = count_flops(model, 60).value - count_flops(model, 10).value
    assert grown == 4 * 3 * 4 * 16 * 50


def test_a_gguf_is_counted_by_formula_and_says_so(model: Model) -> None:
    q = flops(model, 7)
    assert q.value == model.blueprint.flops_per_token(7) and "by formula" in q.reason


def test_a_config_torch_does_not_know_is_counted_by_formula_and_says_so(tmp_path: Path) -> None:
    model = folder_model(tmp_path, "llama")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))
    q = flops(model, 7)
    assert q.value == model.blueprint.flops_per_token(7) and "torch could not trace it" in q.reason


def test_prefill_is_the_sum_of_its_positions_with_one_output_head() -> None:
    b = Blueprint(family="llama", layers=3, width=16, heads=4, kv_heads=2, head_dim=4, ffn=32, vocab=100, context=64,
                  tied=True)
    brute = sum(b.flops_per_token(i) for i in range(11)) - 10 * 2 * 100 * 16
    assert prefill_flops(b, 11) == brute


def test_a_request_is_timed_at_its_tokens() -> None:
    now = [0.0]

    def stream() -> object:
        for wait in (2.0, 0.5, 0.5):
            now[0] += wait
            yield 1
        now[0] += 0.25

    t = time_request(stream, 20, lambda: now[0])
    assert t == Timing(prompt=20, tokens=3, first=2.0, last=3.0, end=3.25)
    assert t.latency == 0.5


def test_a_round_pools_its_requests() -> None:
    values = pooled([Timing(10, 3, 1.0, 2.0, 2.0), Timing(30, 2, 3.0, 6.0, 6.5)])
    assert values == {"request": 4.25, "ttft": 2.0, "prefill": 10.0, "latency": 4 / 3, "decode": 3 / 4}
    assert set(pooled([Timing(10, 1, 1.0, 1.0, 1.0)])) == {"request", "ttft", "prefill"}
    assert set(pooled([Timing(10, 0, 0.0, 0.0, 1.0)])) == {"request"}


def test_percentiles_are_of_single_requests() -> None:
    out = percentiles([Timing(1, 2, float(i), float(i) + 1, float(i) + 1) for i in range(101)])
    assert out["ttft"] == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([Timing(1, 0, 0.0, 0.0, 1.0)]).keys() == {"request"}


def test_shares_of_the_machine(machine: Machine, model: Model) -> None:
    b = model.blueprint
    speed = Quantity(value=100.0, unit="token/s", method="measured", low=90.0, high=110.0)
    used = mfu(machine, b, speed, 20, "float32")
    assert used.value == pytest.approx(100 * prefill_flops(b, 20) / 20 / 1e9)
    read = mbu(machine, b, speed, weights=5000, position=9, element=2.0, threads=2)
    assert read.value == pytest.approx(100 * (5000 + 2 * 2 * 1 * 4 * 2 * 10) / 1e9)
    assert read.low == pytest.approx(0.9 * read.value)
    assert mfu(machine, b, speed, 20, "int8").value is None


def test_the_dtype_a_share_refers_to(model: Model) -> None:
    assert gemm_dtype(model, {"dtype": "q4_0"}) == "int8"
    assert gemm_dtype(model, {"dtype": "BF16"}) == "bfloat16"
    assert gemm_dtype(model, {"dtype": "f16"}) == "float32"
    assert gemm_dtype(model.but(format="safetensors", run=RunPlan(dtype="bfloat16")), {}) == "bfloat16"
