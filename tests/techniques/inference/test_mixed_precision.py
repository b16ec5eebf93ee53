"""Bits go where they matter, within the budget, and into the file as solved."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fivefold.engines import _type_speed
from fivefold.engines._quantize import dequantize
from fivefold.engines._type_speed import TypeSpeeds
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.model import Model
from fivefold.recipe import Recipe
from fivefold.techniques._shared.gguf_types import matrices
from fivefold.techniques._shared.type_time import shares
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


def table(**decode: float) -> TypeSpeeds:
    """Seconds per weight; q5_0 and q5_1 far slower than q8_0, as on a processor without kernels for them."""
    kinds = {"iq4_nl": 0.8, "q5_0": 3.0, "q5_1": 3.0, "q8_0": 1.0, "q3_k": 2.0, "iq4_xs": 2.0, "q4_k": 0.8,
             "q5_k": 2.0, "q6_k": 2.0, **decode}
    kinds = {kind: seconds * 1e-11 for kind, seconds in kinds.items()}
    return TypeSpeeds(threads=2, decode=kinds, head=kinds, prefill=kinds, base={})


def timed(monkeypatch: pytest.MonkeyPatch, speeds: TypeSpeeds | None) -> None:
    monkeypatch.setattr(_type_speed, "known", lambda blueprint: speeds)
    monkeypatch.setattr(_type_speed, "measured", lambda blueprint: speeds)


def test_a_limit_on_time_is_kept_and_costs_damage(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, table())
    model, found = small(tiny), {}
    for time in (0.0, 1.2):
        done = Recipe(technique(bits=5.6, time=time)).apply(model)
        said = done.coverage[-1]
        damage = float(said.split("predicted KL ")[1].split(",")[0])
        found[time] = float(said.split(" times q8_0's decode time")[0].split(", ")[-1]), damage
        if time:
            base = shares(matrices(model), dict.fromkeys(matrices(model), ("q8_0",)), table())
            assert sum(kinds["q8_0"] for kinds in base.values()) == pytest.approx(1.0)
            spent = shares(matrices(model), {n: (k,) for n, k in done.export.types.items()}, table())
            assert sum(sum(kinds.values()) for kinds in spent.values()) == pytest.approx(found[time][0], abs=0.006)
    assert found[0.0][0] > 1.2 >= found[1.2][0] and found[1.2][1] >= found[0.0][1]


def test_a_time_out_of_reach_is_refused_with_the_least(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, table(iq4_nl=0.8, q4_k=0.8))
    with pytest.raises(Misfit, match=r"in 0\.800 times the time of q8_0 at least.*set time to 0\.82"):
        Recipe(technique(bits=5.2, time=0.5)).check(small(tiny))
    Recipe(technique(bits=5.2, time=0.82)).check(small(tiny))
    timed(monkeypatch, None)
    Recipe(technique(bits=5.2, time=0.5)).check(small(tiny))


def test_only_a_limit_on_time_depends_on_the_table(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, table())
    model = small(tiny)
    assert technique().inputs(model) == ""
    before = technique(time=1.0).inputs(model)
    timed(monkeypatch, table(q5_1=1.1))
    assert before != technique(time=1.0).inputs(model) != ""
