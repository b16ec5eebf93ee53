"""write_report: the three files. The page's script and style are this folder's `page/`, put inline.

Nothing a record says can become markup: the data travels as JSON in a script element that is not executed, with `<`,
`>` and `&` escaped, the script sets text through `textContent` only, and a content security policy allows no script
but the one whose hash it names, no network and no plugin.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fivefold.files import write_text
from fivefold.metrics import METRICS
from fivefold.report.data import payload
from fivefold.report.text import markdown
from fivefold.study.trial import Trial

SCRIPTS = ("draw.js", "front.js", "parallel.js", "table.js", "effects.js", "page.js")
PAGE = Path(__file__).parent / "page"


def write_report(
    folder: Path, trials: Sequence[Trial], meta: Mapping[str, Any], analysis: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write report.html, report.md and trials.csv into `folder`; returns their paths.

    `meta`: "settings" (the study's own: model, budget, minimize, ...), "machine" (`Machine.to_json`), "name".
    `analysis`: see `analysis.py`; a part that is missing is reported as missing. Raises StoreError.
    """
    data = payload(trials, meta, analysis or {})
    files = {
        "report.html": html(data), "report.md": markdown(data), "trials.csv": table(trials),
    }
    return [write_text(folder / name, sound(text)) for name, text in files.items()]


def sound(text: str) -> str:
    """Without lone surrogates, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def html(data: Mapping[str, Any]) -> str:
    script = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{script}\n}})();\n'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )
    parts = {
        "POLICY": policy, "TITLE": escape(str(data["title"])), "SCRIPT": script,
        "STYLE": (PAGE / "page.css").read_text(encoding="utf-8"), "DATA": embedded(data),
    }
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    return re.sub("@([A-Z]+)@", lambda found: parts[found[1]], page)


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it lies in, nor open a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def table(trials: Sequence[Trial]) -> str:
    """One row per trial in base units; a number's column is followed by its interval, samples and method."""
    names = [name for name in METRICS if any(name in t.measurement for t in trials)]
    paired = [name for name in METRICS if any(name in t.paired for t in trials)]
    made = sorted({key for t in trials for key in t.made})
    spent = sorted({key for t in trials for key in t.spent})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    sides = ("", " low", " high", " n", " method", " reason")
    writer.writerow([
        "number", "recipe", "outcome", "sentence", "coverage", "artifact", "at",
        *(f"{name} [{METRICS[name].unit}]{side}".strip() for name in names for side in sides),
        *(f"in turn {name} [x]{side}".strip() for name in paired for side in ("", " low", " high", " n")),
        *(f"made {key}" for key in made), *(f"spent {key}" for key in spent),
    ])
    for t in trials:
        row: list[Any] = [t.number, t.recipe, str(t.outcome), t.sentence, "; ".join(t.coverage), t.artifact, t.at]
        for name in names:
            q = t.measurement.get(name)
            row += ["", "", "", "", "", ""] if q is None else [q.value, q.low, q.high, q.n, q.method, q.reason]
        for name in paired:
            q = t.paired.get(name)
            row += ["", "", "", ""] if q is None else [q.value, q.low, q.high, q.n]
        row += [t.made[key].value if key in t.made else None for key in made]
        row += [t.spent.get(key) for key in spent]
        writer.writerow([inert(value) for value in row])
    return out.getvalue()


def inert(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula is led by an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
