"""ggml's quantizer against closed forms and against the independent decoders of the gguf package."""

from __future__ import annotations

import subprocess
import sys

import gguf
import numpy as np
import pytest

from fivefold.engines._quantize import dequantize, fits, quantize, row_bytes, types
from fivefold.errors import NotFinite, RecipeError

RANDOM = np.random.default_rng(0)
IMPORTANCE = RANDOM.random(512).astype(np.float32)


def matrix(rows: int = 24, cols: int = 512) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(rows, cols)).astype(np.float32)


def test_the_types_are_those_of_the_format() -> None:
    assert {"f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q6_k", "iq4_nl"} <= set(types())
    assert not {"q8_1", "q8_k", "i8", "i32", "f64"} & set(types())
    for name, kind in types().items():
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
        assert (kind.block, kind.block_bytes) == (block, size)


def test_q8_0_is_the_closed_form() -> None:
    """Per block of 32: scale = max |x| / 127 in half precision, x -> round(x / scale)."""
    source = matrix()
    blocks = source.reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    expected = np.round(blocks / scale) * scale.astype(np.float16).astype(np.float32)
    got = dequantize(quantize(source, "q8_0"), "q8_0", source.shape)
    assert np.mean(got == expected.reshape(source.shape)) > 0.999
    np.testing.assert_allclose(got, expected.reshape(source.shape), atol=1.01 * float(scale.max()))


def test_q4_0_is_the_closed_form() -> None:
    """Per block of 32: the value of largest size, sign kept, becomes -8; x -> floor(x / scale + 8.5), at most 15."""
    source = matrix()
    blocks = source.reshape(-1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scale = largest / np.float32(-8)
    codes = np.minimum(15, np.floor(blocks * (1 / scale) + np.float32(8.5)))
    expected = (codes - 8) * scale.astype(np.float16).astype(np.float32)
    got = dequantize(quantize(source, "q4_0"), "q4_0", source.shape)
    np.testing.assert_array_equal(got, expected.reshape(source.shape))


def signs(stored: np.ndarray) -> np.ndarray:
    """q1_0, which the gguf package cannot decode: per 128 weights a half-precision scale and one sign bit each."""
    blocks = stored.reshape(-1, 18)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    return ((2.0 * bits - 1) * blocks[:, :2].copy().view(np.float16)).reshape(len(stored), -1)


@pytest.mark.parametrize("kind", list(types()))
def test_decoding_equals_the_gguf_package(kind: str) -> None:
    source = matrix()
    stored = quantize(source, kind, IMPORTANCE)
    assert stored.shape == (24, row_bytes(kind, 512)) and stored.dtype == np.uint8
    got = dequantize(stored, kind, source.shape)
    number = gguf.GGMLQuantizationType[kind.upper()]
    expected = signs(stored) if kind == "q1_0" else gguf.quants.dequantize(stored, number)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(got - source) < 0.85 * np.linalg.norm(source)
    np.testing.assert_array_equal(dequantize(stored.tobytes(), kind, source.shape), got)


def test_more_bits_are_closer() -> None:
    source = matrix()
    errors = {
        kind: np.linalg.norm(dequantize(quantize(source, kind, IMPORTANCE), kind, source.shape) - source)
        for kind in ("iq1_s", "iq2_xxs", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "f16", "f32")
    }
    assert sorted(errors.values(), reverse=True) == list(errors.values()) and errors["f32"] == 0


@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "iq4_nl", "iq2_xs"])
def test_importance_lowers_the_weighted_error(kind: str) -> None:
    source, weights = matrix(), np.where(np.arange(512) % 8 == 0, 100.0, 0.01).astype(np.float32)
    plain = dequantize(quantize(source, kind, np.ones(512, np.float32)), kind, source.shape)
    aimed = dequantize(quantize(source, kind, weights), kind, source.shape)
    assert (weights * (aimed - source) ** 2).sum() < 0.9 * (weights * (plain - source) ** 2).sum()
    np.testing.assert_array_equal(dequantize(quantize(source, kind, weights * 1e-20), kind, source.shape), aimed)


@pytest.mark.parametrize("kind", ["f32", "q4_1", "q6_k", "iq3_s"])
def test_threads_and_chunks_do_not_matter(kind: str) -> None:
    source = matrix(rows=1601)
    whole = quantize(source, kind, IMPORTANCE, threads=4)
    np.testing.assert_array_equal(whole, quantize(source, kind, IMPORTANCE, threads=1))
    np.testing.assert_array_equal(whole[1500:], quantize(source[1500:], kind, IMPORTANCE))
    np.testing.assert_array_equal(whole[:9], quantize(np.asfortranarray(source[:9]), kind, IMPORTANCE))


def test_widths() -> None:
    assert fits("q4_0", 576) and fits("nvfp4", 576) and not fits("q4_k", 576) and fits("q4_k", 1536)
    assert not fits("q8_0", 0) and row_bytes("q4_1", 576) == 360
    with pytest.raises(RecipeError, match="rows of 576 weights cannot be stored as q4_k, whose blocks hold 256"):
        quantize(matrix(cols=576), "q4_k")
    with pytest.raises(RecipeError, match="no type 'q4_9'"):
        fits("q4_9", 32)


@pytest.mark.parametrize("kind", [name for name, kind in types().items() if kind.needs_importance])
def test_types_that_need_importance_say_so(kind: str) -> None:
    with pytest.raises(RecipeError, match="only with an importance vector"):
        quantize(matrix(), kind)


BAD_VECTORS = [np.ones(511), np.zeros(512), -np.ones(512), np.full(512, np.nan), np.ones((1, 512))]


@pytest.mark.parametrize("vector", BAD_VECTORS)
def test_bad_importance_is_refused(vector: np.ndarray) -> None:
    with pytest.raises(RecipeError, match="does not suit rows of 512"):
        quantize(matrix(), "q4_0", vector)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_values_that_cannot_be_stored_are_a_failure(value: float) -> None:
    source = matrix()
    source[3, 4] = value
    with pytest.raises(NotFinite):
        quantize(source, "q8_0")
    if value == 1e5:
        assert dequantize(quantize(source, "f32"), "f32", source.shape)[3, 4] == 1e5


def test_a_wrong_number_of_bytes_is_our_own_error() -> None:
    with pytest.raises(ValueError, match="are not a 24 x 512 matrix"):
        dequantize(b"\0" * 100, "q4_0", (24, 512))


ODD = """
import numpy as np
from fivefold.engines._quantize import dequantize, quantize, types
random = np.random.default_rng(0)
gap = random.normal(size=(1, 512)) * (random.random(512) < 0.02)
odd = {"zero": np.zeros((1, 512)), "tiny": np.full((1, 512), 1e-38), "equal": np.ones((1, 512)), "gap": gap,
       "spike": np.where(np.arange(512) == 7, 6e4, 1e-6) * np.ones((1, 1)), "large": 6e4 * np.sign(gap - 1e-9)}
peaks = [np.ones(512), np.where(np.arange(512) == 9, 1.0, 0.0), np.geomspace(1e-30, 1e30, 512)]
for kind, about in types().items():
    for name, values in odd.items():
        for weights in peaks if about.needs_importance else [None, *peaks]:
            print(kind, name, flush=True)
            values = values.astype(np.float32)
            back = dequantize(quantize(values, kind, weights), kind, values.shape)
            assert np.isfinite(back).all(), (kind, name)
            assert name != "zero" or not back.any(), (kind, name)
"""


def test_odd_matrices_never_end_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", ODD], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout[-200:], done.stderr[-2000:])
