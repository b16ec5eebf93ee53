from __future__ import annotations

import numpy as np
import pytest
import torch

from fivefold.engines import open_session
from fivefold.engines._layers.sparse import packed_bytes
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.model import Trait, load
from fivefold.recipe import Recipe
from fivefold.weights import read_tensors, write_safetensors_folder


def file_bytes(model) -> int:
    return sum(f.stat().st_size for f in model.path.glob("*.safetensors"))


def answers(model) -> tuple[np.ndarray, list[int], dict]:
    session = open_session(model)
    try:
        return session.score(list(range(5, 37))), list(session.generate([5, 6, 7], 8)), session.describe()
    finally:
        session.close()


@pytest.mark.parametrize("prune", ["wanda(windows=1)", 'sparsegpt(pattern="2:4", windows=1)', "magnitude"])
@pytest.mark.parametrize("dtype", ["", ' + dtype(type="bfloat16")'])
def test_the_file_and_the_memory_shrink_by_the_zeros_and_the_answers_stay(tiny, tmp_path, prune, dtype):
    model = tiny(width=128)
    dense = export(Recipe.parse(prune + dtype).apply(model), tmp_path / "dense")
    sparse = export(Recipe.parse(f"{prune} + sparse_storage{dtype}").apply(model), tmp_path / "sparse")
    matrices = {n: t for n, t in read_tensors(dense.path) if len(t.shape) == 2 and ".layers." in n}
    packed = sum(packed_bytes(*t.shape, int((t.torch().bfloat16() != 0).sum())) for t in matrices.values())
    saved = sum(t.nbytes for t in matrices.values()) - packed
    assert 0.43 < saved / sum(t.nbytes for t in matrices.values()) < (0.75 if not dtype else 0.45)
    assert abs(file_bytes(dense) - file_bytes(sparse) - saved) < 4096, "but for the header"
    tensors = {n: t.torch().bfloat16().to(t.torch().dtype) if n in matrices else t.torch()
               for n, t in read_tensors(dense.path)}
    rounded = dense.but(path=write_safetensors_folder(tmp_path / "rounded", tensors, like=dense.path))
    (want, text, _), (got, same, told) = answers(rounded), answers(sparse)
    np.testing.assert_allclose(got, want, atol=2e-5 if not dtype else 0.1)
    assert dtype or text == same
    assert told["tensor_types"]["sparse"] == len(matrices) == 21
    rows = sum(t.shape[0] + 1 for t in matrices.values())
    assert answers(dense)[2]["weight_bytes"] - told["weight_bytes"] == saved - 8 * rows


def test_coverage_and_traits(tiny):
    model = tiny()
    done = Recipe.parse("wanda(sparsity=0.25, windows=1) + sparse_storage").apply(model)
    assert done.coverage[-1] == (
        "sparse_storage: 21 of 21 linear layers, 25.0% of all their weights left out; embedding and head kept"
    )
    assert model.traits - done.traits == {Trait.DENSE_WEIGHTS, Trait.FLOAT_WEIGHTS, Trait.TRAINABLE}


def test_the_order_is_prune_repair_store():
    recipe = Recipe.parse("sparse_storage + repair + wanda")
    assert [t.name for t in recipe] == ["wanda", "repair", "sparse_storage"]


def test_a_dense_model_is_refused_before_any_work(tiny):
    with pytest.raises(Misfit, match="no zeros to leave out") as caught:
        Recipe.parse("sparse_storage").check(tiny())
    assert "\n" not in str(caught.value)


def test_too_few_zeros_are_refused_and_layers_that_would_grow_stay(tiny, tmp_path):
    model = tiny()
    with pytest.raises(Misfit, match=r"only 3\.\d% of the weights are zero"):
        Recipe.parse("magnitude(sparsity=0.03) + sparse_storage").apply(model)
    tensors = {n: t.torch() for n, t in read_tensors(model.path)}
    one = "model.layers.0.self_attn.q_proj"
    tensors[f"{one}.weight"] = tensors[f"{one}.weight"].tril()
    half = model.but(path=write_safetensors_folder(tmp_path / "half", tensors, like=model.path))
    done = Recipe.parse("sparse_storage").apply(half)
    assert done.coverage[-1].startswith("sparse_storage: 1 of 21 linear layers")
    assert answers(done)[2]["tensor_types"]["sparse"] == 1


def test_a_folder_pruned_elsewhere_is_taken(tiny, tmp_path):
    model = tiny()
    pruned = Recipe.parse("wanda(windows=1)").apply(model)
    done = Recipe.parse("sparse_storage").apply(load(pruned.path).but(work=tmp_path / "again"))
    np.testing.assert_allclose(answers(done)[0], answers(pruned)[0], atol=0.05)


def test_what_cannot_be_stored_so_is_refused(tiny):
    with pytest.raises(Misfit, match="float weights"):
        Recipe.parse("wanda + sparse_storage + int8")
    with pytest.raises(Misfit, match="no linear layers in a model of gpt2"):
        Recipe.parse("wanda + sparse_storage").check(tiny("gpt2"))


def test_without_a_compiler_it_says_so(tiny, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Misfit, match="no no-such-compiler on the path"):
        Recipe.parse("wanda + sparse_storage").check(tiny())


def test_zeros_that_repair_left_are_left_out(tiny):
    model = tiny()
    done = Recipe.parse("wanda(windows=1) + repair(steps=2, tokens=256) + sparse_storage").apply(model)
    counts = [t.shape[0] for n, t in read_tensors(done.path) if n.endswith(".values")]
    assert len(counts) == 21
    weights = sum(t.shape[0] * t.shape[1] for n, t in read_tensors(model.path)
                  if len(t.shape) == 2 and ".layers." in n)
    assert sum(counts) - 32 * 21 == weights // 2
    assert torch.isfinite(torch.tensor(answers(done)[0])).all()
