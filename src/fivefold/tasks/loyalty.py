"""Loyalty: does the candidate answer as its parent does, right or wrong?

Two models of equal accuracy may err on different items. *Label loyalty* is the share of items with the same answer.
*Probability loyalty* also looks at how sure they are: 1 - sqrt(JSD(p, q)) averaged over the items, where JSD is the
Jensen-Shannon divergence with logarithms to base 2, the mean of KL(p || m) and KL(q || m) with m = (p + q) / 2. Its
square root is a metric between 0 (equal) and 1 (disjoint).

Sources: Xu et al., Beyond Preserved Accuracy, arXiv 2109.03228; Endres and Schindelin, IEEE Trans. Inf. Theory 49.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fivefold.quantity import Measurement
from fivefold.tasks import _intervals
from fivefold.tasks.choice import Answers, same_items


def js_distance(p: ArrayLike, q: ArrayLike) -> float:
    """Jensen-Shannon distance, base 2, of two distributions (k,)."""
    a, b = np.asarray(p, np.float64), np.asarray(q, np.float64)
    middle = (a + b) / 2
    return float(np.sqrt(max(0.0, (_kl(a, middle) + _kl(b, middle)) / 2)))


def _kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    seen = p > 0
    return float((p[seen] * np.log2(p[seen] / q[seen])).sum())


def per_item(parent: Answers, candidate: Answers) -> NDArray[np.float64]:
    """1 - Jensen-Shannon distance of each item, shape (n,). Raises DataError when the items differ."""
    same_items(parent, candidate)
    pairs = zip(parent.probabilities, candidate.probabilities, strict=True)
    return np.array([1 - js_distance(p, q) for p, q in pairs])


def loyalty(parent: Answers, candidate: Answers) -> Measurement:
    """label_loyalty and probability_loyalty with 95 % intervals. Raises DataError when the items differ."""
    each = per_item(parent, candidate)
    found = {
        "label_loyalty": _intervals.proportion(parent.predictions == candidate.predictions),
        "probability_loyalty": _intervals.mean(each, np.arange(len(each)), "fraction"),
    }
    return Measurement(found, {"task": parent.name, "items": parent.digest})
