"""The packed formats against their arithmetic written out, and the kernels against a float64 product."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fivefold.engines._layers import load_layers
from fivefold.engines._layers.packed import PackedEmbedding, PackedLinear, pack, packable, unpack, write_packed
from fivefold.errors import ModelError


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("bits", "group", "levels"), [(8, 0, 254), (4, 32, 15), (4, 64, 15)])
def test_rounding_error_is_at_most_half_a_step(bits: int, group: int, levels: int) -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    error = (unpack(pack(weight, bits, group)) - weight).abs().view(48, -1, group or 128)
    cells = weight.view(48, -1, group or 128)
    width = 2 * cells.abs().amax(2) if bits == 8 else cells.amax(2) - cells.amin(2)
    assert (error.amax(2) <= 0.5 * width / levels * 1.2).all()
    assert error.max() > 0


def test_four_bit_values_by_hand() -> None:
    weight = torch.arange(16.0).repeat(16, 2)
    packed = pack(weight, 4, 32)
    assert packed["qweight"][0, :3].tolist() == [0 | 1 << 4, 2 | 3 << 4, 4 | 5 << 4]
    assert packed["scale"][0].tolist() == [1.0]
    assert packed["zero"][0].tolist() == [8.0]
    assert torch.equal(unpack(packed), weight)


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
@pytest.mark.parametrize(("bits", "group", "width"), [(8, 0, 48), (8, 0, 128), (4, 32, 128), (4, 64, 48)])
def test_forward_equals_the_product_with_the_unpacked_matrix(rows: int, bits: int, group: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    packed = pack(torch.randn(width, 192, generator=generator), bits, group)
    bias = torch.randn(width, generator=generator)
    x = torch.randn(2, rows, 192, generator=generator).bfloat16().float()
    want = x.double() @ unpack(packed).double().T + bias
    got = PackedLinear({**packed, "bias": bias} if bias is not None else packed)(x)
    assert got.dtype == x.dtype
    assert got.shape == want.shape
    assert (got - want).norm() / want.norm() < 0.01


@pytest.mark.parametrize("offset", [0, 1, 26])
def test_rows_that_are_no_multiple_of_four_may_lie_anywhere(offset: int) -> None:
    packed = pack(torch.randn(257, 64, generator=torch.Generator().manual_seed(0)), 8)
    room = torch.empty(257 * 64 + 64, dtype=torch.int8)
    moved = room[offset : offset + 257 * 64].view(257, 64).copy_(packed["qweight"])
    layer = PackedLinear({**packed, "qweight": moved})
    assert layer.qweight.data_ptr() % 64 == 0
    x = torch.ones(1, 64)
    assert torch.equal(layer(x), PackedLinear(packed)(x))


def test_unpackable_shapes_are_refused() -> None:
    assert not packable(24, 64, 4, 32)
    assert not packable(32, 100, 4, 32)
    assert not packable(32, 64, 4, 16)
    with pytest.raises(ValueError, match="24 x 64"):
        pack(torch.zeros(24, 64), 4, 32)


def tiny(folder: Path, tied: bool) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_folder_computes_like_the_unpacked_weights(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny(tmp_path / "model", tied)
    layers = {"model.layers.0.mlp.up_proj": (4, 32), "model.layers.1.self_attn.q_proj": (8, 0),
              "model.embed_tokens": (8, 0)}
    folder = write_packed(source, tmp_path / "packed", layers)
    model = load_layers(folder, torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(source)
    for name, (bits, group) in layers.items():
        weight = reference.get_submodule(name).weight
        weight.data = unpack(pack(weight.data, bits, group))
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        want, got = reference(ids).logits, model(ids).logits
    assert (got - want).norm() / want.norm() < 0.01
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    assert isinstance(model.get_output_embeddings(), PackedLinear) == tied
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert size < sum(f.stat().st_size for f in source.glob("*.safetensors"))


def test_damaged_packed_folders_are_told_in_one_sentence(tmp_path: Path) -> None:
    source = tiny(tmp_path / "model", tied=True)
    with pytest.raises(ModelError, match="nowhere"):
        write_packed(source, tmp_path / "a", {"model.nowhere": (8, 0)})
    folder = write_packed(source, tmp_path / "b", {"model.layers.0.mlp.up_proj": (8, 0)})
    manifest = folder / "layers.json"
    good = {"kind": "packed", "bits": 8, "group": 0}
    for layers in ({"model.layers.9.mlp.up_proj": good}, {"model.layers.0.mlp.up_proj": {**good, "bits": 3}},
                   {"model.layers.0.mlp.up_proj": {**good, "kind": "os"}}):
        manifest.write_text(json.dumps({"version": 1, "layers": layers}))
        with pytest.raises(ModelError):
            load_layers(folder, torch.float32)
    for bad in ("{", "[]", '{"version": 2, "layers": {}}', '{"version": 1, "layers": {"a": 3}}'):
        manifest.write_text(bad)
        with pytest.raises(ModelError):
            load_layers(folder, torch.float32)
