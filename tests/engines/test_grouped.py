"""The stored form against its description written out bit by bit, and both kernels against float64 products."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fivefold.engines import _native
from fivefold.engines._layers import grouped, load_layers, write_layers
from fivefold.engines._layers.grouped import BITS, GroupedEmbedding, GroupedLinear, pack, packable, unpack
from fivefold.errors import ModelError
from fivefold.testing import tiny_model
from fivefold.weights import read_tensors


@pytest.fixture(params=["this processor", "plain loops"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel as compiled for this machine, and as compiled for one without AVX2 and AVX-512."""
    if request.param == "plain loops":
        monkeypatch.setattr(_native, "FLAGS", tuple(f for f in _native.FLAGS if f != "-march=native"))
    _native.load.cache_clear()
    grouped._library.cache_clear()
    yield
    _native.load.cache_clear()
    grouped._library.cache_clear()


def drawn(rows: int, columns: int, bits: int, group: int, symmetric: bool) -> tuple[dict, torch.Tensor]:
    """Stored tensors and the float64 matrix they must stand for."""
    generator = torch.Generator().manual_seed(bits * rows + columns)
    groups = columns // group if group else 1
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.randn(rows, groups, generator=generator).half()
    offset = None if symmetric else torch.randn(rows, groups, generator=generator).half()
    per = columns // groups
    value = codes.double() - (2 ** (bits - 1) if symmetric else 0)
    matrix = value * scale.double().repeat_interleave(per, 1)
    if offset is not None:
        matrix += offset.double().repeat_interleave(per, 1)
    return pack(codes, scale, offset, bits), matrix


@pytest.mark.parametrize("bits", BITS)
def test_every_code_lies_where_the_kernel_says(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (32, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    stored = pack(codes, torch.ones(32, 1), None, bits)["codes"].numpy()
    assert stored.nbytes == 32 * 64 * bits // 8
    words = stored.view("<u2").reshape(2, 2, bits, 32)
    per = 16 // bits
    for row, column in np.ndindex(32, 64):
        tile, block = row // 16, column // 32
        pair, lane = column % 32 // 2, 2 * (row % 16) + column % 2
        if bits == 3 and pair == 15:
            code = sum(int(words[tile, block, w, lane]) >> 15 << w for w in range(3))
        else:
            code = int(words[tile, block, pair // per, lane]) >> (pair % per * bits) & (2**bits - 1)
        assert code == codes[row, column]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "group", "symmetric"), [
    (48, 192, 32, True), (40, 192, 64, False), (33, 128, 128, False), (16, 130, 0, True), (17, 66, 0, False),
])
def test_the_kernel_multiplies_what_is_stored(
    kernel: None, bits: int, rows: int, columns: int, group: int, symmetric: bool
) -> None:
    packed, matrix = drawn(rows, columns, bits, group, symmetric)
    torch.testing.assert_close(unpack(packed, rows, columns).double(), matrix, rtol=1e-6, atol=1e-5)
    layer = GroupedLinear(packed, rows, columns)
    assert (layer.restored().double() - matrix).abs().max() <= matrix.abs().max() * 2**-8
    for count in (1, 2, 3, 4, 5, 8, 9):
        x = torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).bfloat16().float()
        want, got = x.double() @ matrix.T, layer(x).double()
        assert (got - want).norm() / want.norm() < (1e-5 if count <= grouped.FEW else 1e-2)


@pytest.mark.parametrize("bits", BITS)
def test_neighbours_of_very_different_size_do_not_spoil_the_product(kernel: None, bits: int) -> None:
    packed, matrix = drawn(48, 192, bits, 64, True)
    layer = GroupedLinear(packed, 48, 192)
    x = torch.randn(1, 192, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    for factor in (1e3, 1e30, 1e-30):
        mixed = x.clone()
        mixed[:, ::6] *= factor
        mixed = mixed.bfloat16().float()
        want = mixed.double() @ matrix.T
        assert (layer(mixed).double() - want).norm() / want.norm() < 2**-15
    assert not layer(torch.zeros(1, 192)).any()
    for bad in (float("inf"), float("-inf"), float("nan")):
        x[0, 7] = bad
        assert not layer(x).isfinite().any()


def test_more_threads_compute_the_same(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = drawn(80, 128, 3, 32, False)
    layer, x = GroupedLinear(packed, 80, 128), torch.randn(3, 128)
    alone = layer(x)
    monkeypatch.setattr(layer, "_threads", lambda: 2)
    assert torch.equal(layer(x), alone)


def test_bias_shape_and_dtype_are_those_of_a_linear_layer() -> None:
    packed, matrix = drawn(48, 64, 4, 32, False)
    bias = torch.randn(48)
    layer = GroupedLinear({**packed, "bias": bias}, 48, 64)
    x = torch.randn(2, 3, 64).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    want = x.double() @ matrix.T + bias
    assert (layer(x.float()).double() - want).norm() / want.norm() < 1e-5


def test_an_embedding_looks_rows_up_and_serves_as_the_head() -> None:
    packed, matrix = drawn(70, 64, 8, 0, True)
    embedding = GroupedEmbedding(packed, 70, 64, torch.float32)
    ids = torch.tensor([[0, 69, 17], [16, 17, 5]])
    torch.testing.assert_close(embedding(ids).double(), matrix[ids], rtol=1e-6, atol=1e-6)
    x = torch.randn(1, 64).bfloat16().float()
    torch.testing.assert_close(embedding.as_head()(x).double(), x.double() @ matrix.T, rtol=1e-4, atol=1e-3)


def test_loading_the_kernel_leaves_denormal_numbers_alone() -> None:
    grouped._library()
    assert float((torch.full((100,), 1e-39) * 1.0)[7]) > 0


def test_what_can_be_packed() -> None:
    assert packable(64, 3, 32)
    assert packable(66, 8, 0)
    assert not packable(65, 8, 0)
    assert not packable(48, 4, 32)
    assert not packable(64, 4, 16)
    assert not packable(64, 5, 32)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folder_computes_like_its_unpacked_weights_and_damage_is_told(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_model(tmp_path / "model", family).path
    names = {"llama": ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj", "model.embed_tokens"],
             "gpt2": ["transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_attn", "transformer.wte"]}[family]
    reference = AutoModelForCausalLM.from_pretrained(source)
    made = {}
    for name in names:
        weight = reference.get_submodule(name).weight
        turned = family == "gpt2" and "wte" not in name
        rows, columns = weight.T.shape if turned else weight.shape
        made[name], matrix = drawn(rows, columns, 4, 32, False)
        made[name]["scale"], made[name]["offset"] = made[name]["scale"] / 64, made[name]["offset"] / 64
        weight.data = (matrix.T if turned else matrix).float() / 64
    folder = write_layers(source, tmp_path / "stored", {n: {"kind": "grouped"} for n in names},
                          lambda name, *_: made[name])
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        want, got = reference(ids).logits, load_layers(folder, torch.float32)(ids).logits
    assert (got - want).norm() / want.norm() < 0.02
    shapes = {n: t.shape for n, t in read_tensors(folder)}
    assert shapes[f"{names[0]}.codes"][2] == 64 * 4
    manifest = json.loads((folder / "layers.json").read_text())
    manifest["layers"] = {names[0]: {"kind": "grouped"}, names[1]: {"kind": "grouped"}}
    manifest["layers"][names[1].replace(".1.", ".0.")] = {"kind": "grouped"}
    (folder / "layers.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="no usable stored layer"):
        load_layers(folder, torch.float32)


@pytest.mark.parametrize("change", [
    lambda p: {**p, "codes": p["codes"][:, :1]}, lambda p: {**p, "codes": p["codes"].to(torch.int8)},
    lambda p: {**p, "scale": p["scale"].float()}, lambda p: {**p, "offset": p["offset"][:1]},
    lambda p: {**p, "scale": torch.cat([p["scale"], p["scale"][:, :1]], 1)}, lambda p: {**p, "bias": torch.ones(3)},
])
def test_tensors_that_do_not_fit_never_reach_the_kernel(change) -> None:
    packed, _ = drawn(48, 64, 4, 32, False)
    with pytest.raises(ValueError, match="no grouped matrix"):
        GroupedLinear(change(packed), 48, 64)
