"""Codes and scales of packed matrices, against ggml's own quantizer and dequantizer."""

import numpy as np
import pytest

from fivefold.engines._quantize import dequantize, quantize
from fivefold.techniques._shared.blocks import layouts, put_together, take_apart

MATRIX = np.random.default_rng(3).standard_normal((6, 512)).astype(np.float32)


@pytest.mark.parametrize("kind", sorted(layouts()))
def test_parts_say_what_ggml_dequantizes(kind: str) -> None:
    data = quantize(MATRIX, kind)
    parts = take_apart(data, kind)
    np.testing.assert_allclose(parts.matrix(), dequantize(data, kind, MATRIX.shape), rtol=2e-6, atol=1e-6)
    assert parts.codes.max() <= layouts()[kind].top


@pytest.mark.parametrize("kind", sorted(layouts()))
def test_unchanged_parts_give_the_same_bytes(kind: str) -> None:
    data = quantize(MATRIX, kind)
    assert (put_together(take_apart(data, kind)) == data).all()


@pytest.mark.parametrize("kind", sorted(layouts()))
def test_changed_codes_and_scales_are_what_ggml_reads(kind: str) -> None:
    random = np.random.default_rng(5)
    parts = take_apart(quantize(MATRIX, kind), kind)
    parts.codes = random.integers(0, layouts()[kind].top + 1, parts.codes.shape).astype(np.uint8)
    parts.scale = (parts.scale * random.uniform(0.5, 2, parts.scale.shape)).astype(np.float16).astype(np.float32)
    if parts.minimum is not None:
        parts.minimum = random.standard_normal(parts.minimum.shape).astype(np.float16).astype(np.float32)
    written = put_together(parts)
    np.testing.assert_allclose(dequantize(written, kind, MATRIX.shape), parts.matrix(), rtol=2e-6, atol=2e-6)
