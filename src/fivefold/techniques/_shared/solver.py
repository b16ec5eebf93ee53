"""One choice per item, least total damage within a budget: the multiple-choice knapsack, solved exactly.

    minimise  sum_t damage[t, q(t)]   subject to   sum_t cost[t, q(t)] <= budget

is an integer programme with one 0/1 variable per (item, choice). Its relaxation is fractional in at most one item, so
branch and bound closes at once, where a single Lagrange multiplier only reaches the corners of the convex hull.

Source: Sinha & Zoltners, "The multiple-choice knapsack problem", 1979; HiGHS through scipy.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Table = Mapping[str, Mapping[str, float]]


def choose(damage: Table, cost: Table, budget: float) -> dict[str, str]:
    """Item -> choice. Raises ValueError when even the cheapest choices cost more than `budget`."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    pairs = [(item, choice) for item, choices in damage.items() for choice in choices]
    least = sum(min(cost[item][choice] for choice in choices) for item, choices in damage.items())
    if least > budget:
        raise ValueError(f"the cheapest choices cost {least:g}, more than {budget:g}")
    place = {item: row for row, item in enumerate(damage)}
    one_each = csr_array((np.ones(len(pairs)), ([place[item] for item, _ in pairs], range(len(pairs)))))
    values = np.array([damage[item][choice] for item, choice in pairs])
    costs = np.array([cost[item][choice] for item, choice in pairs], float)
    scale = max(float(costs.max()), 1.0)
    found = milp(
        values / max(float(values.max()), 1e-30), integrality=np.ones(len(pairs)), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs[None] / scale, -np.inf, budget / scale)],
        options={"mip_rel_gap": 1e-6, "time_limit": 60},
    )
    assert found.x is not None, found.message
    chosen = {item: choice for (item, choice), x in zip(pairs, found.x, strict=True) if x > 0.5}
    assert len(chosen) == len(damage)
    return chosen
