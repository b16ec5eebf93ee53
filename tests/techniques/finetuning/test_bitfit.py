"""BitFit: which vectors it trains, against plain training of the same; what it costs and what it saves."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from masked import assert_sparse_gives_it_back, differing, module, plain_training, planned, pupil, trained

from fivefold.errors import Misfit
from fivefold.model import Blueprint
from fivefold.recipe import make
from fivefold.training.method import Lesson
from fivefold.weights import write_safetensors

BIASES = {"llama": ("norm.weight",), "qwen2": ("_proj.bias",), "gpt2": (".bias",)}
SMOLLM2 = Blueprint(family="llama", layers=30, width=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152,
                    context=8192, tied=True)


def lesson(model, name: str = "bitfit"):
    made = module(model)
    out = Lesson(model, made, model.train)
    out.trained = make(name, {}).prepare(out)
    return out


@pytest.mark.parametrize("family", BIASES)
def test_the_formula_counts_what_is_trained(tmp_path: Path, family: str) -> None:
    model = pupil(tmp_path, family)
    given = lesson(model)
    sizes = sum(math.prod(shape) for shape in make("bitfit", {}).shapes(model.blueprint).values())
    assert sizes == sum(p.numel() for p in given.trained.values())
    assert all(name.endswith(("bias", "norm.weight")) for name in given.trained)
    if family != "llama":
        assert len(given.trained) == sum(name.endswith("bias") for name, _ in given.module.named_parameters())


def test_it_trains_less_than_a_thousandth_of_a_real_model() -> None:
    numbers = sum(math.prod(shape) for shape in make("bitfit", {}).shapes(SMOLLM2).values())
    assert numbers == 61 * 576
    assert numbers < 1e-3 * SMOLLM2.parameters


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_it_learns_like_plain_training_of_the_same_vectors(tmp_path: Path, family: str) -> None:
    model = pupil(tmp_path, family)
    done = trained(model, "bitfit(rate=0.01)", tmp_path / "run")
    losses = plain_training(model, module(model), list(lesson(model).trained), range(6), 0.01)
    np.testing.assert_allclose(done.fitted.losses, losses, rtol=1e-4)
    assert done.fitted.after < done.fitted.before


@pytest.mark.parametrize("family", BIASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_else_changes_and_the_file_gives_it_back(tmp_path: Path, family: str, dtype: str) -> None:
    model = pupil(tmp_path, family, dtype=dtype)
    done = trained(model, "bitfit(rate=0.01)", tmp_path / "run")
    changed = differing(model, done.model)
    assert changed and all(name.endswith(BIASES[family]) or "layernorm" in name for name in changed)
    sparse = assert_sparse_gives_it_back(model, done)
    assert sparse.count == sum(int(where.sum()) for where in changed.values()) <= done.numbers
    assert done.delta_bytes < 4 * done.numbers + 300 * len(sparse.entries) + 200, "4 bytes per number and a header"


def test_it_says_what_a_bias_is_here(tmp_path: Path) -> None:
    for family, says in (("llama", "no biases, so the gains of 5 norms"), ("qwen2", "6 biases")):
        done = trained(pupil(tmp_path, family, steps=1), "bitfit", tmp_path / family / "run")
        assert says in done.model.coverage[-1]
        assert f"{done.numbers:,} numbers trained" in done.model.coverage[-1]


def test_a_model_without_vectors_is_refused_before_any_work(tmp_path: Path) -> None:
    bare = pupil(tmp_path)
    folder = tmp_path / "bare"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", {"layer.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(Misfit, match=r"neither biases nor norm gains; use lora") as caught:
        planned(bare.but(path=folder), "bitfit")
    assert "\n" not in str(caught.value)


def test_a_mask_buffer_named_bias_is_none() -> None:
    from fivefold.techniques.finetuning.bitfit import _vectors

    assert _vectors({"h.attn.bias": (1, 1, 8, 8), "h.bias": (4,), "h.norm": (4,)}) == ["h.bias"]
    assert _vectors(vars(SimpleNamespace(weight=(4, 4), norm=(4,)))) == ["norm"]
