"""The packed cache against its arithmetic written out, and against the cache of transformers."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig

from fivefold.engines._kivi import KiviCache, KiviLayer, check, pack, unpack
from fivefold.engines._kivi_type import KiviType, unpackable
from fivefold.errors import ModelError

HEADS, WIDTH = 2, 32
TWO = KiviType(2, 16, 32)


def states(tokens: int, rows: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, HEADS, tokens, WIDTH, generator=generator)
    keys[..., 3] = 40 + 3 * keys[..., 3]
    keys[..., 17] = 2 * keys[..., 17] - 25
    return keys, torch.randn(rows, HEADS, tokens, WIDTH, generator=generator)


def brute_force(cells: np.ndarray, bits: int) -> np.ndarray:
    """The step of every element of a (groups, members) array, if scale and zero were not rounded."""
    return np.repeat((cells.max(1) - cells.min(1))[:, None] / (2**bits - 1), cells.shape[1], 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_every_number_comes_back_within_half_a_step_of_its_group(bits: int, per_channel: bool) -> None:
    cells = states(64)[0]
    packed = pack(cells, bits, 16, per_channel)
    assert packed[0].dtype == torch.uint8 and packed[1].dtype == packed[2].dtype == torch.float16
    error = (unpack(packed, bits, torch.float32) - cells).abs().numpy()
    grouped = cells.numpy().reshape(1, HEADS, 4, 16, 2, 16)  # groups of tokens, groups of channels
    order = (0, 1, 2, 4, 5, 3) if per_channel else (0, 1, 2, 3, 4, 5)
    step = brute_force(grouped.transpose(order).reshape(-1, 16), bits).reshape(grouped.transpose(order).shape)
    step = step.transpose(np.argsort(order)).reshape(cells.shape)
    spread = np.abs(cells.numpy()).max()
    assert (error <= step / 2 * 1.01 + spread * 2**-11 / (2**bits - 1) + 1e-6).all()
    assert (error > 0.4 * step).any()


@pytest.mark.parametrize("offset", [0.0, -700.0, 3001.3])
def test_a_range_far_from_zero_is_spanned_too(offset: float) -> None:
    cells = states(16)[1] + offset
    codes, scale, zero = pack(cells, 8, 16, per_channel=True)
    error = (unpack((codes, scale, zero), 8, torch.float32) - cells).abs()
    assert (error <= scale.float()[:, :, 0] / 2 + abs(offset) * 2**-22).all()
    assert (zero.float()[:, :, 0, 0] <= cells.amin(2)).all()


def test_by_hand() -> None:
    cells = torch.zeros(1, 1, 16, 16)
    cells[0, 0, :, 0] = torch.arange(16) % 4 * 2.0 - 1  # -1, 1, 3, 5 along the tokens of one channel
    codes, scale, zero = pack(cells, 2, 16, per_channel=True)
    assert (scale[0, 0, 0, 0, 0].item(), zero[0, 0, 0, 0, 0].item()) == (2.0, -1.0)
    assert codes[0, 0, 0, :, 0].tolist() == [0, 0b01010101, 0b10101010, 0b11111111]  # tokens i, i + 4, i + 8, i + 12
    assert torch.equal(unpack((codes, scale, zero), 2, torch.float32), cells)


def test_a_range_per_channel_serves_keys_with_outlier_channels() -> None:
    keys, values = states(64)
    queries = torch.randn(1, HEADS, 8, WIDTH, generator=torch.Generator().manual_seed(2))
    errors = {}
    for name, cells in (("keys", keys), ("plain", values)):
        for per_channel in (True, False):
            back = unpack(pack(cells, 2, 16, per_channel), 2, torch.float32)
            errors[name, per_channel] = float((queries @ (back - cells).transpose(2, 3)).abs().mean())
    assert errors["keys", True] < 0.5 * errors["keys", False]
    assert 0.8 < errors["plain", True] / errors["plain", False] < 1.25


@pytest.mark.parametrize("kind", [KiviType(2, 16, 32), KiviType(4, 32, 40), KiviType(8, 16, 0)])
def test_bytes_are_those_of_the_formula_and_only_the_oldest_tokens_are_packed(kind: KiviType) -> None:
    layer, keys, values = KiviLayer(kind), *states(150, rows=2)
    for start, stop in ((0, 20), (20, 21), (21, 90), (90, 150)):
        seen, _ = layer.update(keys[:, :, start:stop], values[:, :, start:stop])
        packed = max(0, stop - kind.residual) // kind.group * kind.group
        assert seen.shape[2] == layer.get_seq_length() == stop and layer.count == packed
        elements = 2 * 2 * HEADS * WIDTH
        formula = packed * elements * (kind.bits / 8 + 4 / kind.group) + (stop - packed) * elements * 4
        assert layer.nbytes() == formula == pytest.approx(kind.mean_bytes(stop, 4) * stop * elements)
        before = max(0, start - kind.residual) // kind.group * kind.group
        assert torch.equal(seen[:, :, before:], keys[:, :, before:stop])
        assert before == 0 or not torch.equal(seen[:, :, :before], keys[:, :, :before])


def test_a_text_within_the_residual_is_kept_bit_for_bit() -> None:
    ours, theirs = KiviCache(KiviType(2, 16, 64)), DynamicCache()
    for seed in range(6):
        more = states(10, seed=seed)
        for got, want in zip(ours.update(*more, 0), theirs.update(*more, 0), strict=True):
            assert torch.equal(got, want)


def test_what_a_draft_added_is_cropped_without_a_trace() -> None:
    keys, values = states(100)
    plain, drafted = KiviLayer(TWO), KiviLayer(TWO, slack=8)
    plain.update(keys[:, :, :60], values[:, :, :60])
    drafted.update(keys[:, :, :60], values[:, :, :60])
    drafted.update(keys[:, :, 90:98], values[:, :, 90:98])
    drafted.crop(60)
    assert drafted.get_seq_length() == 60
    one, other = (layer.update(keys[:, :, 60:70], values[:, :, 60:70]) for layer in (plain, drafted))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    drafted.crop(-3)
    assert drafted.get_seq_length() == 67
    with pytest.raises(ValueError, match="32 tokens are packed and cannot be cropped to 20"):
        plain.crop(20)
    with pytest.raises(NotImplementedError, match="does not change its rows"):
        plain.batch_select_indices(torch.tensor([0]))


def test_padding_does_not_widen_the_ranges_of_a_text() -> None:
    keys, values = states(64, rows=2)
    keys[1, :, :21] = 1e4
    mask = torch.ones(2, 64)
    mask[1, :21] = 0
    cache = KiviCache(TWO, mask=mask)
    cache.update(keys, values, 0)
    seen, _ = cache.update(*states(1, rows=2), 0)
    clean = keys.clone()
    clean[1, :, :21] = clean[1, :, 21:22]
    want = unpack(pack(clean[:, :, :32], 2, 16, per_channel=True), 2, torch.float32)
    assert torch.equal(seen[1, :, 21:32], want[1, :, 21:]) and torch.equal(seen[0, :, :32], want[0])


def test_a_prefix_is_taken_over() -> None:
    prefix, (keys, values) = DynamicCache(), states(80)
    prefix.update(keys[:, :, :70], values[:, :, :70], 0)
    ours = KiviCache(TWO, before=prefix)
    whole = KiviCache(TWO)
    whole.update(keys[:, :, :70], values[:, :, :70], 0)
    assert ours.get_seq_length() == 70
    got, want = (cache.update(keys[:, :, 70:], values[:, :, 70:], 0)[0] for cache in (ours, whole))
    assert torch.equal(got, want)


def test_pieces_end_where_more_tokens_are_packed() -> None:
    kind = KiviType(2, 16, 32)
    assert list(kind.pieces(0, 100)) == [48, 16, 16, 16, 4]
    assert list(kind.pieces(50, 20)) == [14, 6]
    for held in range(120):
        first = next(kind.pieces(held, 200))
        assert kind.packed(held) == kind.packed(held + first - 1) < kind.packed(held + first)


def test_its_word_and_its_refusals() -> None:
    assert KiviType.parse(str(TWO)) == TWO
    assert KiviType.parse("q8_0") is KiviType.parse("kivi3-g32-r1") is None
    with pytest.raises(ModelError, match="65,504 or not finite"):
        pack(torch.full((1, 1, 16, 16), 1e6), 2, 16, per_channel=True)
    check(LlamaConfig(num_hidden_layers=2), TWO)
    with pytest.raises(ModelError, match="kivi2-g16-r32 cache does not fit layers that need a DynamicSlidingWindow"):
        check(MistralConfig(num_hidden_layers=2, sliding_window=64), TWO)
    assert unpackable(MistralConfig(sliding_window=64).to_dict()) == "its config sets sliding_window"
    assert unpackable({"layer_types": ["full_attention", "linear_attention"]}) == "it has layers of linear_attention"
    assert unpackable({"sliding_window": 64, "use_sliding_window": False}) is None
