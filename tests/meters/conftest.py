"""Fixtures of the meters: a clock that is told the time, and a machine, prices and a model with round numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from meter_fakes import Clock

from fivefold.machine import Machine
from fivefold.meters.money import Prices
from fivefold.model import Blueprint, Model
from fivefold.quantity import Quantity


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
