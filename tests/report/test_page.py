"""The page in a real browser: it draws every measured trial, says nothing on the console, and fits a phone."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fivefold.report import write_report
from fivefold.study.trial import Outcome, Trial

pytestmark = pytest.mark.browser
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0",
         "--virtual-time-budget=3000", "--hide-scrollbars", "--dump-dom"]
PROBE = """
<script>
addEventListener("error", (e) => document.documentElement.setAttribute("data-error", e.message));
setTimeout(() => {
  const root = document.documentElement;
  root.setAttribute("data-overflow", root.scrollWidth - root.clientWidth);
}, 1500);
</script>
"""


def render(chromium: str, page: Path, tmp_path: Path, width: int = 1280, probe: bool = True) -> str:
    """The DOM after scripts; fails on a console message or an uncaught error.

    The probe needs the policy off; the policy itself is tried by rendering without the probe.
    """
    text = page.read_text()
    if probe:
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("<head>", f"<head>{PROBE}")
    # Headless windows cannot be narrower than 500 px, so a phone is a frame of its width.
    target = tmp_path / "probe.html"
    target.write_text(text, encoding="utf-8")
    command = [chromium, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000"]
    done = dumped([*command, target.as_uri()], 'data-overflow="' if probe else "</svg>")
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    tag = re.search(r"<html[^>]*>", done.stdout)
    assert tag and "data-error" not in tag[0], tag
    return done.stdout


def dumped(command: list[str], finished: str) -> subprocess.CompletedProcess[str]:
    """The browser's dump; on a busy machine it sometimes comes before the page's scripts, then it is taken again."""
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        if finished in done.stdout:
            break
    return done


def framed(chromium: str, page: Path, tmp_path: Path, width: int) -> int:
    """Pixels by which the page is wider than a frame of `width`."""
    inner = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    (tmp_path / "inner.html").write_text(inner, encoding="utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<!doctype html><body style="margin:0"><iframe id="f" src="inner.html" style="width:{width}px;height:900px;'
        'border:0"></iframe><script>setTimeout(() => { const root = document.getElementById("f").contentDocument'
        '.documentElement; document.body.dataset.overflow = root.scrollWidth - root.clientWidth;'
        "document.body.dataset.width = root.clientWidth; }, 1500)</script>", encoding="utf-8",
    )
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = dumped([chromium, *FLAGS, "--allow-file-access-from-files", profile, outer.as_uri()], 'data-overflow="')
    assert f'data-width="{width}"' in done.stdout
    found = re.search(r'data-overflow="(-?\d+)"', done.stdout)
    assert found
    return int(found[1])


def points(dom: str) -> list[int]:
    plot = re.search(r'id="front-plot".*?</svg>', dom, re.DOTALL)
    assert plot
    return [int(n) for n in re.findall(r'<g class="point[^"]*" data-number="(\d+)"', plot[0])]


def test_every_measured_trial_is_one_point_one_line_one_row(study: Any, chromium: str, tmp_path: Path) -> None:
    page = write_report(tmp_path, *study)[0]
    dom = render(chromium, page, tmp_path)
    measured = [t.number for t in study[0] if t.outcome is Outcome.MEASURED]
    assert sorted(points(dom)) == measured
    lines = re.search(r'id="parallel-plot".*?</svg>', dom, re.DOTALL)
    assert lines and sorted(map(int, re.findall(r'class="line[^"]*" data-number="(\d+)"', lines[0]))) == measured
    assert sorted(map(int, re.findall(r'<tr data-number="(\d+)"', dom))) == measured
    assert 'data-overflow="0"' in dom
    assert "NaN" not in dom.split('id="data"')[0]


def test_the_policy_lets_the_page_draw_itself(study: Any, chromium: str, tmp_path: Path) -> None:
    dom = render(chromium, write_report(tmp_path, *study)[0], tmp_path, probe=False)
    assert len(points(dom)) == sum(t.outcome is Outcome.MEASURED for t in study[0])


@pytest.mark.parametrize("width", [390, 820])
def test_no_sideways_scrolling(
    study: Any, chromium: str, tmp_path: Path, width: int, trial: Callable[..., Trial]
) -> None:
    trials, meta, analysis = study
    long = trial(number=99, recipe=" + ".join(f'technique_{i}(type="q{i}_0", size=0.123456789)' for i in range(12)),
                 sentence="x" * 300, coverage=("y" * 200,))
    analysis["picks"][0]["number"] = 99
    page = write_report(tmp_path, [*trials, long], meta, analysis)[0]
    assert framed(chromium, page, tmp_path, width) == 0


@pytest.mark.parametrize("count", [0, 1, 2])
def test_small_studies_draw_without_errors(study: Any, chromium: str, tmp_path: Path, count: int) -> None:
    dom = render(chromium, write_report(tmp_path, study[0][:count], {})[0], tmp_path)
    assert "Missing" in dom
    assert dom.count("<section") == 11


def test_hostile_text_does_nothing(study: Any, chromium: str, tmp_path: Path, trial: Callable[..., Trial]) -> None:
    trials, meta, analysis = study
    text = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    bad = trial(number=1, recipe=text, sentence=text, coverage=(text,))
    analysis["effects"][0]["technique"] = analysis["picks"][0]["why"] = analysis["picks"][0]["role"] = text
    analysis["picks"][0]["number"] = 1
    dom = render(chromium, write_report(tmp_path, [trials[0], bad, *trials[2:]], meta, analysis)[0], tmp_path)
    assert "<img" not in dom
    assert "<title>synthetic-135m" in dom
    assert "&lt;img" in dom
