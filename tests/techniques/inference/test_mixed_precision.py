"""Bits go where they matter, within the budget, and into the file as solved."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fivefold.engines._quantize import dequantize
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.model import Model
from fivefold.recipe import Recipe
from fivefold.techniques._shared.gguf_types import matrices
from fivefold.techniques.inference.mixed_precision import MixedPrecision, candidates
from fivefold.weights import gguf_header, read_solved


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path / "cache"))


def technique(**changes: object) -> MixedPrecision:
    return MixedPrecision(**{"bits": 5.2, "windows": 4, **changes})


def small(tiny: Callable[..., Model]) -> Model:
    return tiny(layers=2)


@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
def test_the_file_holds_what_was_solved_within_the_budget(
    tiny: Callable[..., Model], tmp_path: Path, rounding: str
) -> None:
    model = Recipe(technique(rounding=rounding)).apply(small(tiny))
    written = export(model, tmp_path / "out")
    tensors = {t.name: t for t in gguf_header(written.path).tensors if len(t.shape) == 2}
    assert set(tensors) == set(matrices(small(tiny)))
    weights = sum(t.shape[0] * t.shape[1] for t in tensors.values())
    assert sum(t.nbytes for t in tensors.values()) * 8 <= 5.2 * weights
    assert len({t.type for t in tensors.values()}) > 1
    for name, (kind, stored) in read_solved(model.export.solved).items():
        assert tensors[name].type == kind
        raw = np.memmap(written.path, np.uint8, "r", tensors[name].offset, (tensors[name].nbytes,))
        assert (raw == stored.raw()).all()
        values = dequantize(np.array(raw), kind.lower(), tensors[name].shape)
        assert np.isfinite(values).all() and values.std() > 0
    assert f"{len(tensors)} of {len(tensors)} matrices" in model.coverage[-1]


def test_more_bits_less_predicted_damage_and_the_second_budget_reuses_the_first(tiny: Callable[..., Model]) -> None:
    model = small(tiny)
    said = [Recipe(technique(bits=bits)).apply(model).coverage[-1] for bits in (4.6, 5.5, 8.5)]
    predicted = [float(s.split("predicted KL ")[1].split(";")[0]) for s in said]
    assert predicted[0] > predicted[1] > predicted[2]
    assert "anew" in said[0] and "earlier" in said[1] and "earlier" in said[2]


def test_feedback_keeps_more_of_the_answers_than_nearest(tiny: Callable[..., Model]) -> None:
    predicted = {}
    for rounding in ("nearest", "feedback"):
        said = Recipe(technique(bits=4.6, rounding=rounding)).apply(small(tiny)).coverage[-1]
        predicted[rounding] = float(said.split("predicted KL ")[1].split(";")[0])
    assert predicted["feedback"] < predicted["nearest"]


def test_too_few_bits_are_refused_before_any_work(tiny: Callable[..., Model]) -> None:
    with pytest.raises(Misfit, match=r"4\.50 bits"):
        Recipe(technique(bits=3.5)).check(small(tiny))


def test_every_candidate_fits_its_width() -> None:
    from fivefold.techniques._shared.gguf_types import fits

    for columns in (64, 256, 576, 1536, 100):
        assert all(fits(kind, columns) for kind in candidates(columns))
