"""Weights in bfloat16: which ways of holding them keep small updates, and that the exact one is exact."""

import math

import numpy as np
import pytest
import torch

from fivefold.training.adamw import AdamW
from fivefold.training.precision import LANES, Dice, Held, State, carry, carry_bytes, read, write

WAYS: tuple[Held, ...] = ("split", "kahan", "stochastic", "nearest")


def any_floats(count: int = 100_000) -> torch.Tensor:
    """Random bit patterns of every exponent but those of inf and nan, and the ties of bfloat16."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, count, dtype=np.uint32)
    bits[: count // 4] = bits[: count // 4] & np.uint32(0xFFFF0000) | np.uint32(0x8000)
    floats = torch.from_numpy(bits.view(np.int32)).view(torch.float32)
    return floats[floats.abs() < 1e38]


def held(value: torch.Tensor, way: Held) -> tuple[torch.Tensor, State]:
    weight = torch.zeros(value.shape, dtype=torch.bfloat16)
    near = carry(weight, way)
    write(weight, value.clone(), near, None)
    return weight, near


def test_split_gives_every_float_back_bit_for_bit() -> None:
    value = any_floats()
    weight, near = held(value, "split")
    assert torch.equal(read(weight, near).view(torch.int32), value.view(torch.int32))


def test_its_upper_half_is_the_nearest_bfloat16() -> None:
    value = any_floats()
    weight, _ = held(value, "split")
    error, least = (weight.double() - value.double()).abs(), (value.bfloat16().double() - value.double()).abs()
    assert torch.equal(error, least)


def test_kahan_keeps_sixteen_bits() -> None:
    value = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    weight, near = held(value, "kahan")
    assert float(((read(weight, near) - value) / value).abs().max()) <= 2.0**-16
    assert float(((weight.float() - value) / value).abs().max()) > 2.0**-10


def test_adamw_on_split_weights_is_float32_adamw_bit_for_bit() -> None:
    draw = torch.Generator().manual_seed(3)
    start = 0.05 * torch.randn(LANES + 100, generator=draw)
    wide, (narrow, near) = start.clone(), held(start, "split")
    adamw = AdamW(decay=0.01)
    states = adamw.state(wide), adamw.state(narrow)
    for step in range(1, 101):
        gradient = torch.randn(start.shape, generator=draw)
        adamw.update(wide, gradient, states[0], {}, 1e-5, step, None)
        adamw.update(narrow, gradient, states[1], near, 1e-5, step, None)
    assert torch.equal(read(narrow, near).view(torch.int32), wide.view(torch.int32))
    assert not torch.equal(wide, start)


@pytest.mark.parametrize("way", WAYS)
def test_who_keeps_small_updates(way: Held) -> None:
    """A thousand updates of 1/40 of what bfloat16 resolves at 0.1: together -0.0122 of 0.1."""
    weight, near = held(torch.full((20_000,), 0.1), way)
    dice = Dice(1) if way == "stochastic" else None
    before, size = float(read(weight, near).mean()), 2.0**-12 / 20
    for _ in range(1000):
        write(weight, read(weight, near) - size, near, dice)
    moved = before - float(read(weight, near).mean())
    if way == "nearest":
        assert moved == 0
    else:
        assert moved == pytest.approx(1000 * size, rel=0.02)


def test_stochastic_rounding_is_right_on_average_on_both_sides_of_zero() -> None:
    low, high = 1.0, 1.0 + 2.0**-7
    for share in (0.1, 0.5, 0.9):
        for sign in (1, -1):
            value = sign * (low + share * (high - low))
            weight = torch.zeros(LANES, dtype=torch.bfloat16)
            write(weight, torch.full((LANES,), value), {}, Dice(5))
            assert set(weight.abs().tolist()) == {low, high}
            up = float((weight.abs() == high).float().mean())
            assert up == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / LANES))


def test_dice_are_uniform() -> None:
    dice = Dice(7)
    rolls = torch.stack([dice.roll(LANES) for _ in range(16)])
    assert int(rolls.min()) >= 0 and int(rolls.max()) <= 65535
    counts = torch.bincount(rolls.flatten() >> 8, minlength=256).double()
    expected = rolls.numel() / 256
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert 255 - 5 * math.sqrt(2 * 255) < chi < 255 + 5 * math.sqrt(2 * 255)
    low = torch.bincount(rolls.flatten() & 255, minlength=256).double()
    assert float(((low - expected) ** 2 / expected).sum()) < 255 + 5 * math.sqrt(2 * 255)


def test_dice_do_not_repeat_themselves_in_time_or_across_lanes() -> None:
    dice = Dice(7)
    rolls = torch.stack([dice.roll(LANES) for _ in range(64)]).double() / 65536 - 0.5
    for a, b in ((rolls[:-1], rolls[1:]), (rolls[:-8], rolls[8:]), (rolls[:, :-1], rolls[:, 1:]),
                 (rolls[:, :-4096], rolls[:, 4096:])):
        assert abs(float((a * b).mean()) * 12) < 5 / math.sqrt(a.numel())


def test_dice_are_a_function_of_seed_and_state() -> None:
    one, same, other = Dice(1), Dice(1), Dice(2)
    assert torch.equal(one.roll(100), same.roll(100)) and not torch.equal(one.roll(100), other.roll(100))
    resumed = Dice(9)
    resumed.state.copy_(one.state)
    assert torch.equal(one.roll(LANES), resumed.roll(LANES))


@pytest.mark.parametrize("way", [*WAYS, "float32"])
def test_what_lies_beside_is_the_formula(way: Held) -> None:
    weight = torch.zeros(33, 5, dtype=torch.float32 if way == "float32" else torch.bfloat16)
    near = carry(weight, way)
    assert sum(t.nbytes for t in near.values()) == carry_bytes(way) * weight.numel()
    assert all(t.shape == weight.shape for t in near.values())
    with pytest.raises(ValueError, match="held as"):
        carry(weight.half(), way)
