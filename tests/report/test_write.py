"""Three files, whole or absent; nothing a record says becomes markup, a formula or a table cell of its own."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fivefold.errors import StoreError
from fivefold.report import write_report
from fivefold.report.write import embedded
from fivefold.study.trial import Outcome, Trial

HOSTILE = [
    "</script><img src=x onerror=\"document.title='owned'\">", "<!--<script>", "]]></style><svg onload=alert(1)>",
    "=HYPERLINK(\"http://evil\")", "a | b\n# heading `code`", "@TITLE@ @DATA@", "\u2028\u2029\x00\ud800", "&lt;b&gt;",
]


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


def data_of(page: str) -> Any:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]


def test_the_three_files(study: Any, tmp_path: Path) -> None:
    paths = write_report(tmp_path, *study)
    assert [p.name for p in paths] == ["report.html", "report.md", "trials.csv"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md", "trials.csv"]
    page = paths[0].read_text()
    assert len(data_of(page)["trials"]) == len(study[0])
    assert not re.search(r"(src|href)=[\"']?(http|//)", page)
    assert len(page) < 300_000


def test_an_unwritable_folder_is_one_sentence(study: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        write_report(tmp_path / "file" / "under", *study)


def test_the_csv_holds_the_records(study: Any, tmp_path: Path) -> None:
    trials = study[0]
    with write_report(tmp_path, *study)[2].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(trials)
    for trial, row in zip(trials, rows, strict=True):
        assert row["recipe"] == trial.recipe
        if trial.outcome is Outcome.MEASURED:
            assert float(row["size [byte]"]) == trial.value("size")
            assert row["energy [J/token] method"] == "modelled"
        else:
            assert row["size [byte]"] == ""


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(study: Any, trial: Callable[..., Trial], tmp_path: Path, text: str) -> None:
    trials, meta, analysis = study
    clean = Elements(write_report(tmp_path / "clean", trials, meta, analysis)[0].read_text())
    bad = trial(number=1, recipe=text, sentence=text, coverage=(text,), artifact=text)
    meta = {**meta, "name": text, "settings": {**meta["settings"], text: text}, "machine": {"cpu": text, "os": text}}
    analysis = {**analysis, "effects": [{**analysis["effects"][0], "technique": text}], "infeasible": text}
    page, markdown, table = write_report(tmp_path / "bad", [trials[0], bad, *trials[2:]], meta, analysis)
    elements = Elements(page.read_text())
    assert (elements.tags, elements.attributes) == (clean.tags, clean.attributes)
    assert data_of(page.read_text())["trials"][1]["recipe"] == text
    assert not re.search(r"<[a-z!/]", markdown.read_text(), re.IGNORECASE)
    with table.open(newline="") as file:
        row = list(csv.DictReader(file))[1]
    assert row["recipe"].lstrip("'")[:3] == text.encode(errors="replace").decode()[:3]
    assert row["recipe"][0] not in "=+-@"


@given(st.text())
def test_embedded_json_is_the_same_json_and_cannot_leave_its_element(text: str) -> None:
    out = embedded({"x": text})
    assert json.loads(out) == {"x": text}
    assert not set("<>&") & set(out)


def test_markdown_tables_are_square(study: Any, tmp_path: Path) -> None:
    lines = write_report(tmp_path, *study)[1].read_text().splitlines()
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("|"):
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    tables = [b for b in blocks if b]
    assert len(tables) >= 6
    for block in tables:
        assert len({line.count("|") for line in block}) == 1
