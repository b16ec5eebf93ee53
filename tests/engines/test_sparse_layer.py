from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fivefold.engines import _native, open_session
from fivefold.engines._layers import load_layers, write_layers
from fivefold.engines._layers.sparse import FEW, SparseLinear, pack, packed_bytes
from fivefold.errors import ModelError
from fivefold.testing import tiny_model
from fivefold.weights import read_tensors, write_safetensors_folder

SHAPES = [(1, 1), (3, 31), (5, 32), (7, 33), (16, 64), (9, 100), (40, 576)]


def matrix(rows: int, columns: int, sparsity: float, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    return weight.masked_fill_(torch.rand(rows, columns, generator=draw) < sparsity, 0.0)


def told(tensors: dict[str, torch.Tensor], columns: int) -> NDArray[np.float64]:
    """The dense matrix, read bit by bit as the docstring says."""
    words, values = tensors["mask"].numpy().view(np.uint32), tensors["values"].float().numpy()
    out, at = np.zeros((len(words), columns)), 0
    for i, row in enumerate(words):
        for j in range(columns):
            if row[j // 32] >> (j % 32) & 1:
                out[i, j] = values[at]
                at += 1
    assert at == len(values) - 32 and not values[at:].any()
    return out


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_packing_loses_only_the_rounding_and_takes_the_bytes_it_says(rows: int, columns: int, sparsity: float) -> None:
    weight = matrix(rows, columns, sparsity)
    tensors = pack(weight)
    np.testing.assert_array_equal(told(tensors, columns), weight.bfloat16().double().numpy())
    stored = int((weight != 0).sum())
    assert sum(t.nbytes for t in tensors.values()) == packed_bytes(rows, columns, stored)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("inputs", [1, 2, 3, 7, FEW, FEW + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_dense_matrix(rows: int, columns: int, inputs: int, dtype: torch.dtype) -> None:
    weight, bias = matrix(rows, columns, 0.5), torch.randn(rows)
    x = torch.randn(2, inputs, columns)[1:].to(dtype)
    layer = SparseLinear({**pack(weight), "bias": bias.to(dtype)}, columns)
    got = layer(x)
    exact = x.double() @ weight.bfloat16().double().T + bias.to(dtype).double()
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    assert got.shape == (1, inputs, rows) and got.dtype == dtype
    precision = 1e-6 if dtype is torch.float32 else 2**-7
    assert bool(((got.double() - exact).abs() <= precision * size + 1e-6).all())


def test_the_dense_matrix_comes_back_in_each_dtype() -> None:
    weight = matrix(9, 100, 0.5)
    layer = SparseLinear(pack(weight), 100)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(layer.dense(dtype), weight.bfloat16().to(dtype))


def test_a_large_matrix_is_unpacked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from fivefold.engines._layers import sparse

    monkeypatch.setattr(sparse, "UNPACKED", 4 * 100 * 4)
    weight, x = matrix(9, 100, 0.5), torch.randn(FEW + 3, 100)
    torch.testing.assert_close(SparseLinear(pack(weight), 100)(x), x @ weight.bfloat16().float().T)


def test_threads_do_not_change_the_result() -> None:
    layer, x, before = SparseLinear(pack(matrix(200, 96, 0.6)), 96), torch.randn(3, 96), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("flag", ["-U__AVX512VBMI2__", "-DPLAIN"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (11, 77), (16, 64), (3, 107)])
def test_other_processors_compute_the_same(tmp_path: Path, flag: str, rows: int, columns: int) -> None:
    compiler = next((c for c in _native.COMPILERS if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    source = Path(_native.__file__).parent / "native" / "sparse.cpp"
    file = tmp_path / "other.so"
    subprocess.run([compiler, str(source), *_native.FLAGS, flag, "-o", str(file)], check=True, timeout=300)
    here = SparseLinear(pack(matrix(rows, columns, 0.5)), columns)
    other = SparseLinear(pack(matrix(rows, columns, 0.5)), columns)
    library = ctypes.CDLL(str(file))
    for name in ("product", "unpack"):
        function = getattr(library, f"sparse_{name}")
        function.argtypes = getattr(here, f"_{name}").argtypes
        setattr(other, f"_{name}", function)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(here.dense(dtype), other.dense(dtype))
        x = torch.randn(7, columns).to(dtype)
        torch.testing.assert_close(here(x), other(x))


def broken(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    mask, values = tensors["mask"].clone(), tensors["values"]
    if how == "a value is missing":
        return {"mask": mask, "values": values[:-1]}
    if how == "a column too many":
        mask[0, -1] |= 1 << 5
        return {"mask": mask, "values": torch.cat([values, values[:1]])}
    if how == "another dtype":
        return {"mask": mask, "values": values.float()}
    if how == "other words":
        return {"mask": mask[:, :-1].contiguous(), "values": values}
    return {"mask": mask}


HOWS = ("a value is missing", "a column too many", "another dtype", "other words", "no values")


@pytest.mark.parametrize("how", HOWS)
def test_tensors_that_do_not_belong_together_are_refused(how: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        SparseLinear(broken(pack(matrix(4, 100, 0.5)), how), 100)


def test_a_folder_is_served_from_it(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2")
    name, rows = "model.layers.1.mlp.up_proj", 128
    weight = matrix(rows, 64, 0.5)
    stored = dict(read_tensors(model.path))
    tensors = {k: t.torch() for k, t in stored.items()} | {f"{name}.weight": weight.bfloat16().float()}
    dense = write_safetensors_folder(tmp_path / "dense", tensors, like=model.path)
    settings = {name: {"kind": "sparse", "columns": 64}}
    sparse = write_layers(dense, tmp_path / "sparse", settings, lambda _, w, __: pack(w.torch()))
    found = []
    for folder in (dense, sparse):
        session = open_session(model.but(path=folder))
        found.append((session.score(list(range(5, 37))), list(session.generate([5, 6, 7], 8)), session.describe()))
        session.close()
    np.testing.assert_allclose(found[0][0], found[1][0], atol=2e-5)
    assert found[0][1] == found[1][1]
    assert found[1][2]["tensor_types"]["sparse"] == 1
    saved = rows * 64 * 4 - packed_bytes(rows, 64, int((weight != 0).sum())) - 8 * (rows + 1)
    assert found[0][2]["weight_bytes"] - found[1][2]["weight_bytes"] == saved


def test_a_damaged_folder_costs_one_sentence(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2")
    name = "model.layers.0.mlp.up_proj"
    settings = {name: {"kind": "sparse", "columns": 64}}
    folder = write_layers(model.path, tmp_path / "sparse", settings, lambda _, w, __: pack(w.torch()))
    for columns in (63, 4096, -1, "many", None):
        text = {"version": 1, "layers": {name: {"kind": "sparse", "columns": columns}}}
        (folder / "layers.json").write_text(json.dumps(text))
        with pytest.raises(ModelError, match="no usable stored layer") as caught:
            load_layers(folder, torch.float32)
        assert "\n" not in str(caught.value)
