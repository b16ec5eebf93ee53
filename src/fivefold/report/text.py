"""The same report as Markdown, for a terminal, a mail or a pull request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CORE = ("size", "memory", "latency", "ttft", "decode", "energy", "money", "agreement", "kl", "accuracy")


def markdown(data: Mapping[str, Any]) -> str:
    sections = [
        _head(data), _picks(data), _trials(data), _failures(data),
        _rows("What each technique did alone", data["effects"], ("technique", "metric", "change")),
        _rows("What techniques did together", data["interactions"],
              ("a", "b", "metric", "apart", "together", "verdict")),
        _rows("What backfired here", data["backfired"], ("what", "metric", "change", "sentence")),
        _rows("Payback", data["payback"], ("number", "resource", "cost", "saving", "tokens", "sentence")),
        _prediction(data), _trust(data), _spend(data),
    ]
    return "\n\n".join(sections) + "\n"


_PLAIN = str.maketrans({**{mark: f"\\{mark}" for mark in "\\`*_[]#"}, **{mark: f"&#{ord(mark)};" for mark in "&<>|"}})


def text(value: Any) -> str:
    """One table cell: no pipe, line break or markup survives."""
    return "" if value is None else " ".join(str(value).split()).translate(_PLAIN)


def code(value: str) -> str:
    """A recipe as a code span; as escaped text where it holds what a code span cannot."""
    return text(value) if set("`<>|&\n") & set(value) or not value.strip() else f"`{value}`"


def quantity(cell: Mapping[str, Any] | None, marks: Mapping[str, str]) -> str:
    if not cell:
        return "–"
    if "v" not in cell:
        return f"– ({text(cell.get('r', 'not known'))})"
    interval = f" [{cell['i']}]" if "i" in cell else ""
    return f"{marks[cell['m']]} {cell['t']} {cell.get('u', '')}".rstrip() + interval


def times(ratio: Mapping[str, Any] | None) -> str:
    """A ratio to the parent behind a number: ", 5.9× [5.7 to 6.1]"."""
    if not isinstance(ratio, Mapping) or "v" not in ratio:
        return ""
    return f", {ratio['t']}×" + (f" [{ratio['i']}]" if "i" in ratio else "")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _head(data: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{n} {outcome}" for outcome, n in data["counts"].items()) or "no trial yet"
    settings = "\n".join(f"- {text(k)}: {text(v)}" for k, v in data["settings"].items())
    return (
        f"# {text(data['title'])}\n\n{counts}.\n\n{settings}\n\n"
        "● measured, = counted, ~ modelled; [low to high] is the 95 % interval."
    ).replace("\n\n\n", "\n")


def _picks(data: Mapping[str, Any]) -> str:
    lead = "## Picks\n\n"
    if data["infeasible"]:
        return lead + text(data["infeasible"])
    if not data["picks"]["rows"]:
        return f"{lead}Missing: {text(data['picks']['why'])}."
    trials = {t["number"]: t for t in data["trials"]}
    names = [n for n in CORE if n in data["metrics"]]
    chosen = [("parent", data["parent"]), *((str(p["role"]), p["number"]) for p in data["picks"]["rows"])]
    known = [(role, trials[number]) for role, number in chosen if number in trials]
    ratios = {p["number"]: p.get("against_parent") or {} for p in data["picks"]["rows"]}
    rows = [
        [data["metrics"][n]["label"], *(
            quantity(t["values"].get(n), data["marks"]) + times(ratios.get(t["number"], {}).get(n)) for _, t in known
        )] for n in names
    ]
    recipes = "\n".join(f"- {text(role)}: trial {t['number']}, {code(t['recipe'])}" for role, t in known)
    how = "\n".join(
        f"- trial {p['number']}, {text('; '.join(filter(None, (p['ratios'], p.get('tested')))))}"
        for p in data["picks"]["rows"] if p.get("ratios")
    )
    return f"{lead}{recipes}\n\n" + table(["", *(text(role) for role, _ in known)], rows) + (how and f"\n\n{how}")


def _trials(data: Mapping[str, Any]) -> str:
    done = [t for t in data["trials"] if t["values"]]
    if not done:
        return "## Measured trials\n\nNone yet."
    names = [n for n in CORE if n in data["metrics"]]
    front = set(data["front"])
    rows = [
        [f"{t['number']}{' (front)' if t['number'] in front else ''}", code(t["recipe"]),
         *(quantity(t["values"].get(n), data["marks"]) for n in names), text("; ".join(t["coverage"]))]
        for t in done
    ]
    return "## Measured trials\n\n" + table(["", "recipe", *names, "coverage"], rows)


def _failures(data: Mapping[str, Any]) -> str:
    rows = [[str(t["number"]), code(t["recipe"]), t["outcome"], text(t["sentence"])]
            for t in data["trials"] if t["failed"] or t["outcome"] == "predicted"]
    return "## Refused, failed, or dropped before any work\n\n" + (
        table(["", "recipe", "outcome", "why"], rows) if rows else "None."
    )


def _rows(title: str, part: Mapping[str, Any], columns: Sequence[str]) -> str:
    if not part["rows"]:
        return f"## {title}\n\nMissing: {text(part['why'])}."
    marks = {"measured": "●", "counted": "=", "modelled": "~"}
    rows = [
        [quantity(row.get(c), marks) if isinstance(row.get(c), Mapping) else text(row.get(c)) for c in columns]
        for row in part["rows"]
    ]
    return f"## {title}\n\n" + table(columns, rows)


def _prediction(data: Mapping[str, Any]) -> str:
    part, screen = data["predictor"], data["screen"]
    first = table(["metric", "median error of the prediction"], [
        [data["metrics"].get(name, {}).get("label", name), quantity(c, data["marks"])] for name, c in part["rows"]
    ]) if part["rows"] else f"Missing: {text(part['why'])}."
    second = quantity(screen["spearman"], data["marks"]) if screen["spearman"] else f"missing: {text(screen['why'])}"
    return f"## Prediction and screen\n\n{first}\n\nRank correlation of screen and final value: {second}."


def _trust(data: Mapping[str, Any]) -> str:
    rows = [
        [row["label"], ", ".join(row["methods"]) or "not obtained", f"{row['known']} of {row['of']}",
         f"±{100 * row['width']:.1f} %" if row["width"] is not None else "–", text("; ".join(row["notes"]))]
        for row in data["honesty"]
    ]
    facts = "\n".join(f"- {text(k)}: {text(v)}" for k, v in [*data["machine"], *data["contexts"]])
    body = table(["number", "how", "trials with it", "typical interval", "note"], rows)
    return f"## How far to trust these numbers\n\n{facts}\n\n{body if rows else 'Nothing measured yet.'}"


def _spend(data: Mapping[str, Any]) -> str:
    phases = data["spend"]["phases"]
    if not phases:
        return "## What the search cost\n\nNothing was recorded yet."
    total = data["spend"]["total"] or 1
    return "## What the search cost\n\n" + table(
        ["phase", "seconds", "share"], [[text(p), f"{s:.1f}", f"{100 * s / total:.0f} %"] for p, s in phases]
    )
