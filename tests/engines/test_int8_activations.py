"""The 8-bit product against whole numbers in numpy, its codes against their definition, and folders read back."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fivefold.engines import _native
from fivefold.engines._layers import int8_activations, load_layers, write_layers
from fivefold.engines._layers.int8_activations import Int8Embedding, Int8Linear, codes, pack, rounded, unpack
from fivefold.errors import ModelError
from fivefold.testing.tiny import tiny_model

SHAPES = [(16, 4), (48, 64), (50, 66), (1, 1), (13, 7), (112, 1536), (576, 576)]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=["", "-U__AVX512VNNI__", "-DPLAIN"], ids=["as compiled here", "without VNNI", "plain"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(_native, "FLAGS", (*_native.FLAGS, request.param))
        monkeypatch.setattr(_native, "load", _native.load.__wrapped__)
        library = int8_activations._library.__wrapped__()
        monkeypatch.setattr(int8_activations, "_library", lambda: library)


def whole(rows: int, columns: int, seed: int) -> np.ndarray:
    """Codes with the largest one in every row, so that every scale is exactly 1."""
    out = np.random.default_rng(seed).integers(-127, 128, (rows, columns))
    out[np.arange(rows), np.random.default_rng(seed + 1).integers(0, columns, rows)] = 127
    return out


@pytest.mark.parametrize("tokens", [*range(1, 13), 128, 131])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.usefixtures("kernel")
def test_the_product_is_that_of_whole_numbers(threads: int, rows: int, columns: int, tokens: int) -> None:
    q, p = whole(rows, columns, 1), whole(tokens, columns, 2)
    want = p @ q.T
    assert abs(want).max() < 1 << 24, "float32 holds the sums"
    layer = Int8Linear({"qweight": torch.tensor(q, dtype=torch.int8), "scale": torch.ones(rows)})
    got = layer(torch.tensor(p, dtype=torch.float32))
    np.testing.assert_array_equal(got.numpy(), want)
    if columns < 1536:
        half = layer(torch.tensor(p).bfloat16())
        assert torch.equal(half, torch.tensor(want).float().bfloat16())


@pytest.mark.usefixtures("kernel")
def test_the_widest_sums_do_not_overflow() -> None:
    columns = 1 << 16
    layer = Int8Linear({"qweight": torch.full((17, columns), 127, dtype=torch.int8), "scale": torch.ones(17)})
    for sign in (1, -1):
        assert float(layer(torch.full((1, columns), 127.0 * sign))[0, 16]) == sign * 127.0**2 * columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_rounded_by_their_definition(threads: int, dtype: torch.dtype) -> None:
    x = torch.randn(300, 96, generator=torch.Generator().manual_seed(3)).mul(3).to(dtype)
    layer = Int8Linear(pack(torch.eye(96)))
    got = layer(x).double()
    scale = x.double().abs().amax(1, keepdim=True) / 127
    place = x.double() / scale
    want = place.round() * scale
    off = (got - want).abs() > (2**-8 * want.abs() if dtype == torch.bfloat16 else 1e-5 * want.abs())
    between = (place - place.floor() - 0.5).abs() < 1e-4
    assert not (off & ~between).any(), "only a value half-way between two codes may go either way"
    assert ((got - x.double()).abs() <= scale * 0.5 * 1.001 + want.abs() * 2**-8).all()


def test_zero_rows_and_no_rows() -> None:
    layer = Int8Linear({**pack(torch.randn(20, 12)), "bias": torch.arange(20.0)})
    assert torch.equal(layer(torch.zeros(2, 3, 12)), torch.arange(20.0).expand(2, 3, 20))
    assert layer(torch.zeros(0, 12)).shape == (0, 20)
    assert torch.equal(Int8Linear(pack(torch.zeros(20, 12)))(torch.ones(1, 12)), torch.zeros(1, 20))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_not_hidden(bad: float, dtype: torch.dtype) -> None:
    x = torch.ones(3, 64, dtype=dtype)
    x[1, 5] = bad
    for layer in (Int8Linear(pack(torch.randn(40, 64))), Int8Linear(pack(torch.randn(40, 64)), limit=6.0),
                  Int8Linear(pack(torch.randn(40, 64), torch.tensor([5])))):
        y = layer(x)
        assert y[[0, 2]].isfinite().all() and not y[1].isfinite().any()


def with_outliers(tokens: int, columns: int, seed: int = 4) -> torch.Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    x[:, 5] *= 40
    x[::2, columns - 1] += 25
    return x


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.usefixtures("kernel")
def test_columns_beside_are_multiplied_in_float(threads: int, tokens: int) -> None:
    weight, x = torch.randn(37, 70, generator=torch.Generator().manual_seed(5)), with_outliers(tokens, 70)
    bias = torch.randn(37, generator=torch.Generator().manual_seed(6))
    columns = torch.tensor([5, 69])
    inside = torch.ones(70).index_fill(0, columns, 0)
    want = rounded(x * inside).double() @ rounded(weight * inside).double().T + bias
    want += x[:, columns].double() @ weight[:, columns].bfloat16().double().T
    got = Int8Linear({**pack(weight, columns), "bias": bias})(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.usefixtures("kernel")
def test_inputs_above_the_limit_are_multiplied_in_float(threads: int, tokens: int) -> None:
    weight, x = torch.randn(37, 70, generator=torch.Generator().manual_seed(5)), with_outliers(tokens, 70)
    for limit in (0.5, 2.0, 6.0, 30.0):
        large = torch.where(x.abs() > limit, x, 0)
        want = (rounded(x - large).double() + large.double()) @ rounded(weight).double().T
        torch.testing.assert_close(Int8Linear(pack(weight), limit)(x).double(), want, rtol=1e-4, atol=1e-4)
    want = x.double() @ rounded(weight).double().T
    torch.testing.assert_close(Int8Linear(pack(weight), 0.0)(x).double(), want, rtol=1e-4, atol=1e-4)


def test_all_columns_beside_is_a_product_in_16_bits() -> None:
    weight, x = torch.randn(37, 70), with_outliers(9, 70)
    got = Int8Linear(pack(weight, torch.arange(70)))(x)
    torch.testing.assert_close(got, x @ weight.bfloat16().float().T, rtol=1e-4, atol=1e-4)


def test_weights_are_rounded_to_half_a_step_of_their_row() -> None:
    weight = torch.randn(40, 90, generator=torch.Generator().manual_seed(7)) * torch.logspace(-3, 3, 40)[:, None]
    error = (unpack(pack(weight)) - weight).abs().amax(1)
    assert (error <= weight.abs().amax(1) / 127 * 0.5001).all() and error.min() > 0
    columns = torch.tensor([0, 40])
    assert torch.equal(unpack(pack(weight, columns))[:, columns], weight[:, columns].bfloat16().float())
    assert codes(torch.tensor([-9.0, 2.5, 3.5]), torch.tensor(1.0)).tolist() == [-9, 2, 4]


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_reads_back_as_the_weights_it_stands_for(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_model(tmp_path / "model", tied=tied).path
    layers = {name: {"kind": "int8_activations", "limit": 0.0}
              for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.embed_tokens")}
    folder = write_layers(source, tmp_path / "out", layers, lambda name, weight, _: pack(weight.torch()))
    model, reference = load_layers(folder, torch.float32), AutoModelForCausalLM.from_pretrained(source)
    for name in layers:
        weight = reference.get_submodule(name).weight
        weight.data = rounded(weight.data)
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        want, got = reference(ids).logits, model(ids).logits
    tolerance = 0.02 if tied else 1e-5  # the head rounds its input
    assert (got - want).norm() / want.norm() < tolerance
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    assert isinstance(model.get_output_embeddings(), Int8Linear) == tied


def test_damaged_folders_are_told_in_one_sentence(tmp_path: Path) -> None:
    source, name = tiny_model(tmp_path / "model").path, "model.layers.0.mlp.up_proj"
    width = 64
    good = pack(torch.randn(128, width), torch.tensor([3, 9]))
    bad = [
        {**good, "columns": torch.tensor([3, width], dtype=torch.int32)},
        {**good, "columns": torch.tensor([9, 3], dtype=torch.int32)},
        {**good, "columns": torch.tensor([-1, 3], dtype=torch.int32)},
        {k: v for k, v in good.items() if k != "beside"},
        {**good, "scale": good["scale"][1:]}, {**good, "scale": good["scale"].bfloat16()},
        {**good, "qweight": good["qweight"][:, 1:]}, {**good, "qweight": good["qweight"].short()},
        {**good, "qweight": torch.full_like(good["qweight"], -128)},
    ]
    for number, tensors in enumerate([good, *bad]):
        folder = write_layers(source, tmp_path / str(number), {name: {"kind": "int8_activations"}},
                              lambda *_, tensors=tensors: tensors)
        if number == 0:
            load_layers(folder, torch.float32)
            continue
        with pytest.raises(ModelError, match="make the artifact again"):
            load_layers(folder, torch.float32)
    manifest = tmp_path / "0" / "layers.json"
    for limit in (-1, "six", float("nan")):
        manifest.write_text(json.dumps({"version": 1, "layers": {name: {"kind": "int8_activations", "limit": limit}}}))
        with pytest.raises(ModelError, match="make the artifact again"):
            load_layers(tmp_path / "0", torch.float32)
