"""One choice per item, least total damage within budgets: the multiple-choice knapsack, solved exactly.

    minimise  sum_t damage[t, q(t)]   subject to   sum_t cost_k[t, q(t)] <= budget_k   for each budget k

is an integer programme with one 0/1 variable per (item, choice). Its relaxation is fractional in at most one item per
budget, so branch and bound closes at once, where a Lagrange multiplier only reaches the corners of the convex hull.

Source: Sinha & Zoltners, "The multiple-choice knapsack problem", 1979; HiGHS through scipy.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Table = Mapping[str, Mapping[str, float]]
SECONDS = 60
GAP = 1e-6
"""Relative distance to the proven optimum at which a choice counts as exact."""


def choose(damage: Table, *budgets: tuple[Table, float]) -> dict[str, str]:
    """Item -> choice; each of `budgets` is (cost, most it may sum to).

    Raises ValueError when no choice keeps them all, and when the optimum is not proven within a minute.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    pairs = [(item, choice) for item, choices in damage.items() for choice in choices]
    place = {item: row for row, item in enumerate(damage)}
    one_each = csr_array((np.ones(len(pairs)), ([place[item] for item, _ in pairs], range(len(pairs)))))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for cost, budget in budgets:
        least = sum(min(cost[item][choice] for choice in choices) for item, choices in damage.items())
        if least > budget:
            raise ValueError(f"the cheapest choices cost {least:g}, more than {budget:g}")
        costs = np.array([cost[item][choice] for item, choice in pairs], float)
        scale = max(float(costs.max()), 1e-300)
        constraints.append(LinearConstraint(costs[None] / scale, -np.inf, budget / scale))
    values = np.array([damage[item][choice] for item, choice in pairs])
    found = milp(
        values / max(float(values.max()), 1e-30), integrality=np.ones(len(pairs)), bounds=Bounds(0, 1),
        constraints=constraints, options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if found.x is None or found.status != 0:
        raise ValueError(f"no choice keeps all budgets ({found.message.strip()})")
    chosen = {item: choice for (item, choice), x in zip(pairs, found.x, strict=True) if x > 0.5}
    assert len(chosen) == len(damage)
    return chosen
