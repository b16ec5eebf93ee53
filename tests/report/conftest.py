"""A clearly synthetic study: round numbers by formula, so that a test can work out what the page must say."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from fivefold.quantity import Measurement, Quantity
from fivefold.study.trial import Outcome, Trial

TYPES = ("q8_0", "q5_1", "q5_0", "iq4_nl", "q4_0", "q4_1")


def q(value: float, unit: str, method: str = "measured", spread: float = 0.0, n: int = 1, reason: str = "") -> Quantity:
    low, high = (value * (1 - spread), value * (1 + spread)) if spread else (None, None)
    return Quantity(value=value, unit=unit, method=method, n=n, low=low, high=high, reason=reason)  # type: ignore[arg-type]


def numbers(bits: float, threads: int) -> Measurement:
    size = 134.5e6 * bits / 8
    latency = (0.002 + size / 30e9 * 1.5) * (1.2 if threads == 1 else 1.0)
    kl = 0.9 * 2.0 ** (-1.3 * (bits - 3))
    quantities = {
        "size": q(size, "byte", "counted"), "network": q(size, "byte", "counted"),
        "memory": q(size * 1.1 + 9e7, "byte", spread=0.01, n=5), "latency": q(latency, "s/token", spread=0.04, n=9),
        "ttft": q(0.21 + bits / 100, "s", spread=0.05, n=9), "decode": q(1 / latency, "token/s", spread=0.04, n=9),
        "prefill": q(600 - 10 * bits, "token/s", spread=0.03, n=9),
        "mbu": q(size / latency / 33e9, "fraction", spread=0.04, n=9),
        "mfu": q(0.4 + bits / 100, "fraction", spread=0.03, n=9),
        "energy": q(latency * 30, "J/token", "modelled", 0.4, 9, "watts per core of a synthetic processor"),
        "money": q(latency * 4, "USD/Mtoken", "modelled", 0.4, 9),
        "kl": q(kl, "nat/token", spread=0.08, n=2048),
        "agreement": q(1 - 0.5 * kl / (1 + kl), "fraction", spread=0.02, n=2048),
    }
    return Measurement(quantities, {"engine": "synthetic 1.0", "workload": "synthetic"})


def make(count: int = 24) -> list[Trial]:
    """The parent, then `count` - 1 trials: most measured, some screened, predicted and failed."""
    spent = {"build": 4.0, "screen": 2.0, "measure": 6.0, "quality": 3.0, "overhead": 1.0, "energy.J": 300.0}
    trials = [Trial(number=0, recipe="parent", outcome=Outcome.MEASURED, measurement=numbers(32, 2), spent=spent)]
    for i in range(1, count):
        bits, threads = 4.2 + (i * 37 % 60) / 10, 1 + i % 2
        recipe = f'gguf(type="{TYPES[i % 6]}") + threads(count={threads})'
        done = numbers(bits, threads)
        guess = Measurement({k: v.scaled(1 + (i % 5 - 2) / 20, v.unit, "modelled") for k, v in done.items()
                             if k in ("latency", "size", "energy")})
        trial = Trial(number=i, recipe=recipe, outcome=Outcome.MEASURED, predicted=guess, measurement=done,
                      screen=Measurement({"kl": done["kl"].scaled(1.1, "nat/token")}), spent=spent,
                      coverage=("gguf: 210 of 211 tensors",))
        if i % 7 == 3:
            trial = trial.but(outcome=Outcome.SCREENED, measurement=Measurement({}))
        if i % 9 == 5:
            trial = trial.but(outcome=Outcome.PREDICTED, measurement=Measurement({}), screen=Measurement({}),
                              sentence="predicted memory of 2.6e+08 byte misses the limit memory<=250MB")
        if i % 11 == 8:
            trial = trial.but(outcome=Outcome.OUT_OF_MEMORY, measurement=Measurement({}), screen=Measurement({}),
                              sentence="the build needed more than 8 GB; lower the batch")
        trials.append(trial)
    return trials


META = {
    "settings": {"model": "synthetic-135m", "budget": "memory<=250MB, agreement>=0.9",
                 "minimize": "latency,energy,size", "allowance": "8min", "workload": "synthetic", "seed": 0},
    "machine": {"cpu": "Synthetic CPU", "cores": 2, "isa": ["avx2"], "ram": 24 << 30, "gpus": [], "os": "Linux",
                "date": "2026-01-01", "rates": {"bandwidth.2": q(33e9, "byte/s", spread=0.05, n=7).to_json()}},
}


def analysis() -> dict[str, Any]:
    def c(value: float, spread: float = 0.05) -> dict[str, Any]:
        low, high = value - spread, value + spread
        return Quantity(value=value, unit="fraction", method="measured", n=6, low=low, high=high).to_json()

    names = ("gguf", "threads", "prune_depth", "repair")
    return {
        "parent": 0, "front": [1, 2, 4, 6],
        "picks": [{"role": r, "number": n, "why": f"the {r} of the trials within the budget",
                   "against_parent": {"latency": q(0.0123, "x", spread=0.4, n=6).to_json()},
                   "ratios": f"ratios: measured in turn, {n} rounds", "tested": f"McNemar p = 0.{n}"}
                  for r, n in (("smallest", 2), ("greenest", 6), ("safest", 4))],
        "effects": [{"technique": t, "metric": m, "change": c(-0.6 + 0.25 * i + 0.1 * j)}
                    for i, t in enumerate(names) for j, m in enumerate(("latency", "energy", "kl"))],
        "interactions": [{"a": "gguf", "b": "threads", "metric": "latency", "apart": c(-0.6), "together": c(-0.4),
                          "verdict": "worse together"}],
        "backfired": [{"what": "threads(count=4)", "metric": "latency", "change": c(0.4),
                       "sentence": "more threads than cores wait for each other at every barrier"}],
        "payback": [{"number": 2, "resource": "energy", "cost": q(900, "J", "modelled", 0.4).to_json(),
                     "saving": q(0.2, "J/token", "modelled", 0.4).to_json(),
                     "tokens": q(4500, "token", "modelled").to_json(),
                     "sentence": "repaid after 4,500 tokens"}],
        "predictor": {"latency": c(0.06, 0.03), "size": c(0.01, 0.005)},
        "screen": {"metric": "kl", "spearman": Quantity(value=0.93, unit="1", method="measured", n=15).to_json()},
    }


@pytest.fixture
def study() -> Any:
    """(trials, meta, analysis) of the synthetic study."""
    return make(), META, analysis()


@pytest.fixture
def trial() -> Callable[..., Trial]:
    """One synthetic measured trial, changed as asked."""
    return lambda **changes: make(2)[1].but(**changes)


@pytest.fixture(scope="session")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no Chromium is installed")
    return found
