"""The knapsack against brute force."""

import itertools

import numpy as np
import pytest

from fivefold.techniques._shared.solver import choose


@pytest.mark.parametrize("seed", range(6))
def test_equals_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    items, kinds = [f"t{i}" for i in range(6)], ["a", "b", "c"]
    damage = {i: {k: float(random.exponential()) for k in kinds} for i in items}
    cost = {i: {k: float(random.integers(1, 40)) for k in kinds} for i in items}
    budget = float(sum(np.mean(list(cost[i].values())) for i in items))

    def total(table: dict[str, dict[str, float]], combination: tuple[str, ...]) -> float:
        return sum(table[i][k] for i, k in zip(items, combination, strict=True))

    best = min(total(damage, c) for c in itertools.product(kinds, repeat=6) if total(cost, c) <= budget)
    chosen = tuple(choose(damage, (cost, budget))[i] for i in items)
    assert total(cost, chosen) <= budget
    assert total(damage, chosen) == pytest.approx(best)


def test_byte_counts_of_real_size_stay_within_the_budget() -> None:
    random = np.random.default_rng(1)
    items = [f"t{i}" for i in range(210)]
    cost = {i: {"4": 5e5, "5": 6e5, "8": 9e5} for i in items}
    damage = {i: {"4": d, "5": d / 4, "8": d / 256} for i, d in zip(items, random.lognormal(-7, 2, 210), strict=True)}
    chosen = choose(damage, (cost, 1.3e8))
    spent = sum(cost[i][k] for i, k in chosen.items())
    assert 1.3e8 - 4e5 < spent <= 1.3e8


def test_impossible_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="cheapest"):
        choose({"t": {"a": 1.0}}, ({"t": {"a": 10.0}}, 9.0))


@pytest.mark.parametrize("seed", range(6))
def test_two_budgets_equal_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    items, kinds = [f"t{i}" for i in range(6)], ["a", "b", "c"]
    damage, size, time = (
        {i: {k: float(random.exponential()) for k in kinds} for i in items} for _ in range(3)
    )

    def total(table: dict[str, dict[str, float]], combination: tuple[str, ...]) -> float:
        return sum(table[i][k] for i, k in zip(items, combination, strict=True))

    every = list(itertools.product(kinds, repeat=6))
    sizes, times = (sorted(total(t, c) for c in every) for t in (size, time))
    budgets = (size, sizes[len(every) // 3]), (time, times[len(every) // 3])
    allowed = [c for c in every if all(total(t, c) <= most for t, most in budgets)]
    chosen = tuple(choose(damage, *budgets)[i] for i in items)
    assert chosen in allowed and total(damage, chosen) == pytest.approx(min(total(damage, c) for c in allowed))
    assert total(damage, tuple(choose(damage, budgets[0])[i] for i in items)) <= total(damage, chosen)


def test_budgets_that_only_clash_together_are_refused() -> None:
    damage = {"t": {"small": 1.0, "fast": 1.0}}
    size, time = {"t": {"small": 1.0, "fast": 2.0}}, {"t": {"small": 2.0, "fast": 1.0}}
    with pytest.raises(ValueError, match="no choice keeps all"):
        choose(damage, (size, 1.5), (time, 1.5))


def test_no_budget_takes_the_least_damage() -> None:
    assert choose({"t": {"a": 1.0, "b": 0.5}}) == {"t": "b"}
