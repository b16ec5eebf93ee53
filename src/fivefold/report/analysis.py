"""What the study room's analysis looks like when it arrives here: plain JSON, every part optional.

Q below is a quantity as `Quantity.to_json` writes it: {"value", "unit", "method", "n", "low", "high", "reason"}.
"change", "apart" and "together" are relative changes in the unit fraction (-0.31 reads "31 % less"), but differences in
the metric's own unit where that is a fraction or nats. A "role" may hold several, comma-separated.

    {
      "parent": 0,                     number of the trial everything is compared with
      "front": [3, 7, 9],              trials within the budget that nothing dominates
      "infeasible": "nothing meets ...",                       one sentence, when nothing meets the budget
      "picks": [{"role": "smallest", "number": 7, "why": "...", "against_parent": {"size": Q in "x", ...},
                 "ratios": "how they were obtained", "tested": "accuracy against the parent's, or empty"}],
      "effects": [{"technique": "gguf", "metric": "latency", "change": Q}],
      "interactions": [{"a": "gguf", "b": "threads", "metric": "latency", "apart": Q, "together": Q,
                        "verdict": "better together"}],
      "backfired": [{"what": "threads(count=4)", "metric": "latency", "change": Q, "sentence": "..."}],
      "payback": [{"number": 7, "resource": "energy", "cost": Q, "saving": Q per token, "tokens": Q in "token",
                   "sentence": "repaid after 4.1 M tokens"}],
      "predictor": {"latency": Q},     median |predicted / measured - 1|
      "screen": {"metric": "kl", "spearman": Q},
      "missing": {"interactions": "no pair was measured both alone and together"}
    }

A part that is absent, empty or of another shape is shown as missing, with the reason from "missing" when there is one;
nothing is made up in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LISTS: dict[str, tuple[str, ...]] = {
    "picks": ("role", "number"), "effects": ("technique", "metric", "change"),
    "interactions": ("a", "b", "metric", "apart", "together"), "backfired": ("what", "sentence"),
    "payback": ("number", "resource"),
}
"""Part -> the keys an entry cannot do without."""
SHAPE = "the analysis holds {} in a shape this report does not read"


def entries(analysis: Mapping[str, Any], part: str) -> tuple[list[Mapping[str, Any]], str]:
    """(entries of a list part, "") or ([], why there are none)."""
    given = analysis.get(part)
    if isinstance(given, Sequence) and not isinstance(given, str):
        sound = [e for e in given if isinstance(e, Mapping) and all(k in e for k in LISTS[part])]
        if sound:
            return sound, ""
        if given:
            return [], SHAPE.format(part)
    return [], _reason(analysis, part)


def table(analysis: Mapping[str, Any], part: str) -> tuple[Mapping[str, Any], str]:
    """(a mapping part, "") or ({}, why there is none)."""
    given = analysis.get(part)
    if isinstance(given, Mapping) and given:
        return given, ""
    return {}, _reason(analysis, part)


def numbers(analysis: Mapping[str, Any], part: str) -> list[int]:
    given = analysis.get(part)
    whole = isinstance(given, Sequence) and all(isinstance(n, int) for n in given)
    return list(given) if whole and given is not None else []


def _reason(analysis: Mapping[str, Any], part: str) -> str:
    if not analysis:
        return "the study has not been analysed yet"
    missing = analysis.get("missing")
    why = missing.get(part) if isinstance(missing, Mapping) else None
    return str(why) if why else "the study's records do not hold enough for it yet"
