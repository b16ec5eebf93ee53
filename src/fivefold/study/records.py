"""Records: what each technique did to quality where it was measured, as the first guess for any model.

`records.json` is written by benchmarks/techniques.py: agreement and KL of a recipe with and without each technique, on
SmolLM2-135M. A guess for a recipe starts from its bits per weight b (the level is that of block formats):

    changed answers = 0.2 * 2^-((b - 5.1) / 1.8)        KL = 0.14 * 2^-((b - 5.1) / 0.9)

A technique that chose how weights are stored moves b by what its record says beyond or short of this rule, so that one
record speaks for all its settings. Any other multiplies the agreement by what its record kept, and adds its KL. That
effects add up and carry over to another model is an assumption; the trials correct it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

from fivefold.metrics import METRICS
from fivefold.recipe import Recipe
from fivefold.study.pareto import ON_TASKS

STORES = 0.05
"""Relative change of the bits per weight from which a technique counts as one that stores."""
LEVEL = {"agreement": (0.2, 1.8), "kl": (0.14, 0.9)}
"""Metric -> (at 5.1 bits, bits that halve it); of agreement, of the share of changed answers."""
AT = 5.1
LEAST = 1e-4
MOST = {"agreement": 1.0, "kl": 20.0}


@functools.cache
def records() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Technique -> "with" and "without" -> recipe, bits, agreement, kl."""
    text = resources.files(__package__).joinpath("records.json").read_text(encoding="utf-8")
    found: Mapping[str, Mapping[str, Mapping[str, Any]]] = json.loads(text)["techniques"]
    return found


def told(name: str) -> str:
    """The record of a technique as a phrase, or ""."""
    if (found := records().get(name)) is None:
        return ""
    with_, without = found["with"], found["without"]
    return (
        f"`{with_['recipe']}` against `{without['recipe']}` on SmolLM2-135M: KL {with_['kl']:.3g}"
        f" ({without['kl']:.3g}), agreement {with_['agreement']:.3f} ({without['agreement']:.3f})"
    )


def guess(metric: str, recipe: Recipe, bits: float, parent: float | None = None) -> float | None:
    """Agreement, KL or the score of a choice task of a recipe of that many bits per weight, before any trial.

    Choosing among a few answers is easier than among all tokens: of the share of changed tokens a task's score is taken
    to lose a quarter. None for other metrics, and for a task whose `parent` score is unknown.
    """
    if metric in ON_TASKS:
        return _on_task(metric, 1.0 - (guess("agreement", recipe, bits) or 0.0), parent)
    if metric not in LEVEL:
        return None
    known = [r for t in recipe if (r := records().get(t.name)) is not None]
    lost = _rule(metric, bits + sum(_moved(metric, r) for r in known if _stores(r)))
    for record in (r for r in known if not _stores(r)):
        with_, without = record["with"][metric], record["without"][metric]
        lost = 1 - (1 - lost) * with_ / max(without, 1e-3) if metric == "agreement" else lost + with_ - without
    return 1.0 - min(1.0, max(0.0, lost)) if metric == "agreement" else max(LEAST, lost)


def _on_task(metric: str, changed: float, parent: float | None) -> float | None:
    """What a share of changed tokens makes of a task's metric: a quarter of it changes answers."""
    if metric == "flips":
        return changed / 4
    if parent is None or METRICS[metric].better == "lower":
        return parent
    return parent * (1.0 - changed / 4)


def _rule(metric: str, bits: float) -> float:
    """Share of changed answers, or KL."""
    level, halves = LEVEL[metric]
    return min(MOST[metric], level * 2.0 ** (-(bits - AT) / halves))


def _stores(record: Mapping[str, Mapping[str, Any]]) -> bool:
    return abs(record["with"]["bits"] / record["without"]["bits"] - 1) > STORES


def _moved(metric: str, record: Mapping[str, Mapping[str, Any]]) -> float:
    """Bits by which the rule has to be moved to say what the record says the technique changed."""
    with_, without = record["with"][metric], record["without"][metric]
    seen = 1 - with_ / max(without, 1e-3) if metric == "agreement" else with_ - without
    level, halves = LEVEL[metric]
    return AT - halves * math.log2(min(MOST[metric], max(LEAST, seen)) / level) - float(record["with"]["bits"])
