from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fivefold.engines import Sampling
from fivefold.machine import Machine
from fivefold.meters.money import Prices
from fivefold.model import Blueprint, Model
from fivefold.quantity import Quantity

GREEDY = Sampling()


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Traffic:
    name: str
    requests: list[Request]
    batch: int = 1


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeSession:
    """Takes `per_prompt` seconds per prompt token and `per_token` per later token, on a clock of its own."""

    clock: Clock
    per_prompt: float = 0.01
    per_token: float = 0.1
    answer: int = 1000
    vocab: int = 32
    calls: list[str] = field(default_factory=list)

    def generate(self, prompt: list[int], max_tokens: int, sampling: Sampling = GREEDY) -> Iterator[int]:
        self.calls.append("generate")
        assert not sampling.stop, "answers must have full length"
        self.clock.now += self.per_prompt * len(prompt)
        for i in range(min(max_tokens, self.answer)):
            if i:
                self.clock.now += self.per_token
            yield i % self.vocab

    def generate_batch(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        self.calls.append(f"batch {len(prompts)}")
        self.clock.now += self.per_token * max_tokens
        return [[1] * max_tokens for _ in prompts]

    def describe(self) -> dict[str, Any]:
        return {"engine": "fake", "threads": 2}

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def machine() -> Machine:
    def rate(value: float, unit: str) -> Quantity:
        return Quantity(value=value, unit=unit, method="measured", low=value, high=value)

    rates = {"bandwidth.2": rate(1e9, "byte/s"), "gemm.float32": rate(1e9, "FLOP/s")}
    return Machine(id="m", cpu="AMD EPYC", code="AuthenticAMD-25-17", cores=2, isa=(), ram=1 << 30, gpus=(),
                   os="Linux", rates=rates)


@pytest.fixture
def prices() -> Prices:
    return Prices(electricity_usd_per_kwh=0.36, core_hour_usd=1.8, gpu_hour_usd=0.0, egress_usd_per_gb=1.0,
                  date="2026-01-01")


@pytest.fixture
def model(tmp_path: Path) -> Model:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(b"x" * 5000)
    shape = Blueprint(family="llama", layers=2, width=8, heads=2, kv_heads=1, head_dim=4, ffn=16, vocab=32,
                      context=64, tied=True)
    return Model(name="tiny", path=folder / "tiny.gguf", format="gguf", blueprint=shape)
