"""The gather kernels against products written out in float64, with AVX-512, without it and as plain loops."""

import ctypes
from pathlib import Path

import pytest
import torch
from torch import nn

from fivefold.engines import _native
from fivefold.engines._layers import _gather
from fivefold.engines._layers.selected_ffn import SelectedFeedForward
from fivefold.engines._layers.thresholded import ThresholdedLinear
from fivefold.engines._layers.thresholded_ffn import ThresholdedFeedForward

SHAPES = [(64, 64), (37, 45), (96, 320), (1, 33), (130, 1)]
ACTS = {
    "silu": nn.functional.silu, "relu": nn.functional.relu, "gelu": nn.functional.gelu,
    "gelu_tanh": lambda v: nn.functional.gelu(v, approximate="tanh"),
}


@pytest.fixture(scope="module", params=["", "-U__AVX512F__", "-DPLAIN"], ids=["native", "without AVX-512", "plain"])
def library(request, tmp_path_factory):
    if not request.param:
        return _gather.kernels()
    target = tmp_path_factory.mktemp("other") / "gather.so"
    source = Path(_native.__file__).parent / "native" / "gather.cpp"
    compiler = _native._compiler("gather")
    _native._build("gather", [compiler, str(source), *_native.FLAGS, *_native._openmp(), request.param], target)
    return _gather.declared(ctypes.CDLL(str(target)))


@pytest.fixture(autouse=True)
def kernels(library, monkeypatch):
    for module in ("thresholded", "thresholded_ffn", "selected_ffn"):
        monkeypatch.setattr(f"fivefold.engines._layers.{module}.kernels", lambda: library)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def between(values: torch.Tensor, share: float) -> float:
    """A threshold in a gap between two of `values`, so that rounding moves none of them across."""
    ordered = values.flatten().sort().values
    place = int(share * len(ordered))
    near = slice(max(1, place - 20), place + 20)
    gaps = ordered[near] - ordered[near.start - 1 : near.stop - 1][: len(ordered[near])]
    best = near.start + int(gaps.argmax())
    return float((ordered[best] + ordered[best - 1]) / 2)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    limit = 1e-5 if got.dtype == torch.float32 else 5e-3
    assert got.shape == want.shape
    assert float((got.double() - want).norm() / want.norm().clamp_min(1e-9)) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_a_linear_layer_is_the_product_with_its_small_inputs_zeroed(dtype, shape, rows):
    inputs, outputs = shape
    columns, bias = random(inputs, outputs).bfloat16(), random(outputs, seed=1)
    x = random(1, rows, inputs, seed=2).to(dtype)
    for threshold in (0.0, 0.7, 9.0):
        layer = ThresholdedLinear(columns, bias, threshold)
        mask = torch.tensor([[[1.0 if abs(float(v)) > threshold else 0.0 for v in row] for row in x[0]]])
        if rows > _gather.FEW:
            mask[0, 0] = 1
        close(layer(x), (x.double() * mask) @ columns.double() + bias)
        if rows <= _gather.FEW:
            assert (layer.kept, layer.seen) == (int(mask.sum()), rows * inputs)


def test_a_batch_of_single_tokens_has_no_first_token():
    layer, x = ThresholdedLinear(random(64, 32).bfloat16(), None, 0.7), random(8, 1, 64)
    torch.testing.assert_close(layer(x), torch.cat([layer(row[None]) for row in x]), rtol=1e-4, atol=1e-4)


def test_a_threshold_of_zero_is_the_dense_layer():
    columns, x = random(192, 96).bfloat16(), random(1, 192, seed=3).bfloat16()
    x[0, 5:50] = 0
    got = ThresholdedLinear(columns, None, 0.0)(x)
    want = (x.double() @ columns.double()).bfloat16()
    assert (got.view(torch.int16).int() - want.view(torch.int16).int()).abs().max() <= 1


def test_nothing_that_is_not_a_number_is_skipped():
    x = random(1, 64)
    x[0, 40] = float("nan")
    assert ThresholdedLinear(random(64, 40).bfloat16(), None, 5.0)(x).isnan().all()
    ffn = SelectedFeedForward(neurons(64, 48, seed=4), ACTS["silu"], "silu", 1e9)
    assert ffn(x).isnan().all()


@pytest.mark.parametrize("threads", [2, 3])
def test_the_result_does_not_depend_on_the_number_of_threads(threads):
    x = random(1, 128)
    layers = [
        ThresholdedLinear(random(128, 200).bfloat16(), None, 0.5),
        ThresholdedFeedForward(random(128, 192).bfloat16(), random(96, 128).bfloat16(), ACTS["silu"], "silu", 0.4, 0.4),
        SelectedFeedForward(neurons(128, 96, 16), ACTS["silu"], "silu", 0.1),
        SelectedFeedForward(neurons(128, 96), ACTS["silu"], "silu", 0.1),
    ]
    torch.set_num_threads(1)
    want = [layer(x) for layer in layers]
    torch.set_num_threads(threads)
    for layer, one in zip(layers, want, strict=True):
        assert torch.equal(layer(x), one)


@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize(("width", "ffn"), [(64, 160), (40, 70)])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_thresholded_feed_forward_is_its_formula(activation, width, ffn, rows):
    gate, up, down = (random(ffn, width, seed=s).bfloat16() for s in (1, 2, 3))
    x, act = random(rows, width, seed=4), ACTS[activation]
    threshold = between(x.abs(), 0.4)
    first = torch.arange(rows)[:, None] < (rows > _gather.FEW)
    kept = x.double() * ((x.abs() > threshold) | first)
    hidden = act(kept @ gate.double().T) * (kept @ up.double().T)
    threshold_down = between(hidden.abs(), 0.5)
    want = (hidden * ((hidden.abs() > threshold_down) | first)) @ down.double()
    gate_up = torch.cat([gate, up]).T.contiguous()
    layer = ThresholdedFeedForward(gate_up, down, act, activation, threshold, threshold_down)
    close(layer(x), want)
    if rows <= _gather.FEW:
        assert list(layer.kept) == [int((x.abs() > threshold).sum()), int((hidden.abs() > threshold_down).sum())]


def neurons(width: int, ffn: int, rank: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    found = {name: random(ffn, width, seed=seed + i).bfloat16() for i, name in enumerate(("gate", "up", "down"))}
    if rank:
        found |= {"reduce": random(rank, width, seed=8).bfloat16(), "expand": random(rank, ffn, seed=9).bfloat16(),
                  "offset": random(ffn, seed=10)}
    return found


@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize(("width", "ffn", "rank"), [(64, 160, 0), (64, 160, 24), (40, 70, 0), (40, 70, 33)])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_selected_feed_forward_is_its_formula(activation, width, ffn, rank, rows):
    tensors, x, act = neurons(width, ffn, rank, seed=20), random(rows, width, seed=4), ACTS[activation]
    gate, up, down = (tensors[name].double() for name in ("gate", "up", "down"))
    a = act(x.double() @ gate.T)
    score = a.abs()
    if rank:
        score = x.double() @ tensors["reduce"].double().T @ tensors["expand"].double() + tensors["offset"]
    threshold = between(score, 0.6)
    chosen = score > threshold
    kept = chosen | (torch.arange(rows)[:, None] < (rows > _gather.FEW))
    layer = SelectedFeedForward(tensors, act, activation, threshold)
    close(layer(x), (a * (x.double() @ up.T) * kept) @ down)
    if rows <= _gather.FEW:
        assert (layer.kept, layer.seen) == (int(chosen.sum()), rows * ffn)


def test_bfloat16_feed_forwards_round_once():
    x = random(1, 64).bfloat16()
    tensors = neurons(64, 96)
    gate_up = torch.cat([tensors["gate"], tensors["up"]]).T.contiguous()
    hidden = ACTS["silu"](x.double() @ tensors["gate"].double().T) * (x.double() @ tensors["up"].double().T)
    want = hidden @ tensors["down"].double()
    for layer in (ThresholdedFeedForward(gate_up, tensors["down"], ACTS["silu"], "silu", 0.0, 0.0),
                  SelectedFeedForward(tensors, ACTS["silu"], "silu", -0.0)):
        assert float(((layer(x).double() - want) / want).abs().max()) < 2**-8
