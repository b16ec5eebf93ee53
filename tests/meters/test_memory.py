import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fivefold.meters import memory
from fivefold.meters.memory import PeakMemory, cache_bytes, weight_bytes
from fivefold.model import Model, RunPlan

MB = 1 << 20


def block() -> bytearray:
    return bytearray(b"\1" * (96 * MB))


def test_the_peak_of_a_window_is_seen_after_it_is_gone_and_forgotten_by_the_next() -> None:
    before = psutil.Process().memory_info().rss
    with PeakMemory() as first:
        block()
    with PeakMemory() as second:
        pass
    assert first.peak.value >= before + 90 * MB
    assert second.peak.value <= first.peak.value - 80 * MB
    assert first.peak.method == "measured" and first.gpu_peak.value is None


def test_an_outer_window_keeps_the_peak_that_an_inner_one_resets() -> None:
    before = psutil.Process().memory_info().rss
    with PeakMemory() as outer:
        block()
        with PeakMemory() as inner:
            pass
    assert outer.peak.value >= before + 90 * MB
    assert inner.peak.value <= outer.peak.value - 80 * MB
    assert not PeakMemory._open


@pytest.mark.parametrize("reset", [True, False])
def test_the_peak_so_far(monkeypatch: pytest.MonkeyPatch, reset: bool) -> None:
    if not reset:
        monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    with PeakMemory() as outer:
        before = outer.so_far()
        kept = block()
        between = outer.so_far()
        with PeakMemory() as inner:
            pass
        assert outer.so_far() >= between and (inner.peak.value or 0) >= before + 90 * MB
        time.sleep(3 * memory.SAMPLE_SECONDS)
        del kept
        assert outer.so_far() >= between >= before + 90 * MB
    assert outer.peak.value is not None and outer.peak.value >= between


def test_sampling_where_the_mark_cannot_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    before = psutil.Process().memory_info().rss
    with PeakMemory() as window:
        kept = block()
        time.sleep(10 * memory.SAMPLE_SECONDS)
        del kept
    assert window.peak.value >= before + 90 * MB and "samples" in window.peak.reason


def test_weights_on_disk(model: Model, tmp_path: Path) -> None:
    assert weight_bytes(model).value == 5000
    folder = tmp_path / "hf"
    folder.mkdir()
    for name, size in (("a.safetensors", 10), ("b.safetensors", 20), ("tokenizer.json", 40)):
        (folder / name).write_bytes(b"x" * size)
    both = replace(model, path=folder, format="safetensors")
    assert weight_bytes(both).value == 30
    assert weight_bytes(replace(both, path=tmp_path)).value is None


def test_cache_per_token(model: Model) -> None:
    numbers = 2 * 2 * 1 * 4  # keys and values x layers x kv heads x head dim
    assert cache_bytes(model, {}).value == numbers * 2
    assert cache_bytes(model.but(run=RunPlan(cache_type="q8_0")), {}).value == numbers * 34 / 32
    assert cache_bytes(model.but(format="safetensors"), {}).value == numbers * 4
    assert cache_bytes(model, {"cache_bytes_per_token": 99}).value == 99
    assert cache_bytes(model.but(run=RunPlan(cache_type="q2_x")), {}).value is None
