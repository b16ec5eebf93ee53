"""The ternary layer and its kernel against a float64 product of the weights written out."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fivefold.engines import _native
from fivefold.engines._layers import load_layers, write_layers
from fivefold.engines._layers.ternary import TernaryLinear, pack, packed_bytes, rounded, unpack
from fivefold.errors import ModelError
from fivefold.testing import tiny_model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(rows: int, columns: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(-1, 0, 1), scales as float16 has them, and the float64 matrix they stand for."""
    generator = torch.Generator().manual_seed(rows + columns)
    values = torch.randint(-1, 2, (rows, columns), generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).half()
    matrix = (values.double().view(rows, groups, -1) * scale.double()[:, :, None]).view(rows, columns)
    return values, scale, matrix


def test_codes_by_hand_and_bytes_by_formula() -> None:
    values = torch.zeros(1, 70, dtype=torch.int8)
    values[0, [0, 16, 32, 48, 1, 69]] = torch.tensor([1, -1, 1, 0, -1, 1], dtype=torch.int8)
    packed = pack(values, torch.ones(1, 1))
    assert packed["codes"].shape == (1, 32)
    assert packed["codes"][0, :2].tolist() == [2 | 0 << 2 | 2 << 4 | 1 << 6, 0 | 1 << 2 | 1 << 4 | 1 << 6]
    assert packed["codes"][0, 16 + 5] == 2 | 1 << 2 | 1 << 4 | 1 << 6
    assert torch.equal(unpack(packed["codes"], 70), values.float())
    assert packed_bytes(1, 70) == 2 * 16 + 2
    for rows, columns, group in ((8, 576, 64), (5, 1536, 0), (3, 100, 0)):
        values, scale, _ = drawn(rows, columns, columns // group if group else 1)
        size = rows * ((columns + 63) // 64 * 16 + 2 * (columns // group if group else 1))
        assert sum(t.nbytes for t in pack(values, scale).values()) == packed_bytes(rows, columns, group) == size


@pytest.mark.parametrize("count", [1, 3, 8, 9])
@pytest.mark.parametrize("activations", [0, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [
    (48, 64, 0), (33, 576, 192), (17, 576, 64), (16, 100, 0), (24, 1536, 256), (40, 320, 320),
])
def test_the_product_is_exact(rows: int, columns: int, group: int, activations: int, count: int) -> None:
    values, scale, matrix = drawn(rows, columns, columns // group if group else 1)
    x = torch.randn(2, count, columns, generator=torch.Generator().manual_seed(count))
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    layer = TernaryLinear({**pack(values, scale), "bias": bias}, columns, group, activations)
    seen = x
    if activations:
        step = x.abs().amax(2, keepdim=True).double() / 127
        seen = (x.double() / step).round() * step
        assert torch.allclose(rounded(x).double(), seen, atol=1e-6)
    want = seen.double() @ matrix.T + bias
    assert (layer(x) - want).norm() / want.norm() < 1e-6
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(torch.zeros(1, columns)).tolist() == [bias.tolist()]
    x[0, 0, 3] = float("nan")
    assert layer(x)[0, 0].isnan().any() and layer(x)[1].isfinite().all()


def test_without_vector_instructions_the_kernel_gives_the_same(tmp_path: Path) -> None:
    source = Path(_native.__file__).parent / "native" / "ternary.cpp"
    library = tmp_path / "plain.so"
    command = [_native._compiler("ternary"), str(source), "-O2", "-std=c++17", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run(command, check=True)
    plain = _native.ctypes.CDLL(str(library))
    for columns, group in ((576, 64), (100, 0)):
        values, scale, _ = drawn(12, columns, columns // group if group else 1)
        x = torch.randn(2, columns, generator=torch.Generator().manual_seed(5))
        for activations, name in ((0, "ternary_float"), (8, "ternary_int8")):
            layer = TernaryLinear(pack(values, scale), columns, group, activations)
            want = layer(x)
            layer._product = getattr(plain, name)
            assert torch.allclose(layer(x), want, rtol=1e-5, atol=1e-5)


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    values, scale, _ = drawn(8, 128, 1)
    good = pack(values, scale)
    for tensors, columns, group, activations in (
        (good, 64, 0, 0), (good, 128, 64, 0), (good, 128, 0, 4), (good, 128, 96, 0),
        ({**good, "codes": good["codes"] | 3}, 128, 0, 0), ({**good, "scale": scale.float()}, 128, 0, 0),
    ):
        with pytest.raises(ValueError, match=r"belong|codes|whole groups"):
            TernaryLinear(tensors, columns, group, activations)
    source = tiny_model(tmp_path / "model").path
    name = "model.layers.0.mlp.up_proj"
    settings = {"kind": "ternary", "group": 0, "activations": 0}
    folder = write_layers(source, tmp_path / "stored", {name: settings}, lambda *_: pack(*drawn(128, 64, 1)[:2]))
    assert load_layers(folder, torch.float32).get_submodule(name).stored == "ternary"
    manifest = folder / "layers.json"
    data = json.loads(manifest.read_text())
    data["layers"][name]["group"] = 64 * 7
    manifest.write_text(json.dumps(data))
    with pytest.raises(ModelError, match=r"no usable stored layer 'model\.layers\.0\.mlp\.up_proj'"):
        load_layers(folder, torch.float32)
