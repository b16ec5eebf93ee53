"""Damage from a sample of rows against the whole matrix, and rounding only what was not rounded before."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fivefold.engines._quantize import dequantize
from fivefold.model import Model
from fivefold.techniques._shared.candidates import Candidates, Rounding, prepare, rounded, sample, sampled_damage
from fivefold.techniques._shared.gguf_types import matrices
from fivefold.techniques._shared.sensitivity import Curvature, load_curvature, save_curvatures

KINDS = ("q4_0", "q5_0", "q8_0")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path / "cache"))


def curvature(rows: int, columns: int = 64) -> Curvature:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, columns, generator=draw)
    shares = torch.rand(rows, generator=draw) ** 6
    return Curvature(inputs=inputs.T @ inputs / 500, rows=shares / shares.sum())


@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
def test_a_sample_of_rows_predicts_the_damage_of_all(rounding: Rounding) -> None:
    matrix = np.random.default_rng(1).standard_normal((2000, 64)).astype(np.float32)
    known = curvature(2000)
    guessed = sampled_damage(matrix, KINDS, known, rounding)
    for kind in KINDS:
        data = rounded(matrix, kind, known, rounding, sweeps=0)
        whole = known.damage(torch.from_numpy(dequantize(data, kind, matrix.shape) - matrix))
        assert guessed[kind] == pytest.approx(whole, rel=0.1)
    assert guessed["q4_0"] > guessed["q5_0"] > guessed["q8_0"]


def test_the_sample_stands_for_every_row_once_and_holds_the_heaviest() -> None:
    weights = np.random.default_rng(0).random(5000) ** 8
    rows, share = sample(weights)
    assert len(rows) == len(set(rows.tolist())) == 625
    assert float(share.sum()) == pytest.approx(5000)
    assert set(np.argsort(-weights)[:300]) <= set(rows.tolist())
    rows, share = sample(weights[:50])
    assert sorted(rows.tolist()) == list(range(50)) and (share == 1).all()


def test_curvatures_come_back_from_the_file(tmp_path: Path) -> None:
    known = curvature(10)
    known.lookup_rows, known.lookup_columns = torch.rand(10), torch.rand(64)
    save_curvatures(tmp_path, {"a": known, "b": curvature(3)})
    back = load_curvature(tmp_path, "a")
    for part in ("inputs", "rows", "lookup_rows", "lookup_columns"):
        assert torch.equal(getattr(back, part), getattr(known, part))
    assert load_curvature(tmp_path, "b").lookup_rows is None


def prepared(model: Model) -> Candidates:
    types = dict.fromkeys(matrices(model), ("q4_0", "q8_0"))
    return prepare(model, types, windows=2, length=64, rounding="feedback")


def test_only_what_was_not_rounded_before_is_rounded(tiny: Callable[..., Model]) -> None:
    model = tiny(layers=1)
    names = list(matrices(model))
    first = prepared(model).round(dict.fromkeys(names, "q4_0"))
    assert f"{len(names)} of {len(names)} matrices rounded anew" in first.note and "anew from" in first.note
    mixed = {**dict.fromkeys(names, "q4_0"), names[0]: "q8_0"}
    second = prepared(model).round(mixed)
    assert f"1 of {len(names)} matrices rounded anew" in second.note and "known earlier" in second.note
    assert second.predicted < first.predicted
    for name in names[1:]:
        assert (second.packed[name] == first.packed[name]).all()


def test_the_rounded_matrix_is_the_one_judged(tiny: Callable[..., Model]) -> None:
    from fivefold.export.gguf_ import exported_tensors

    model = tiny(layers=1)
    found = prepared(model)
    name = next(n for n in matrices(model) if "ffn_up" in n)
    matrix = exported_tensors(model.path)[name].numpy()
    one = found.round({name: "q4_0"})
    error = torch.from_numpy(dequantize(one.packed[name], "q4_0", matrix.shape) - matrix)
    assert one.predicted == pytest.approx(load_curvature(found.folder, name).shrunk(128).damage(error))
