"""The benchmark page is what its fragments say, and says nothing about the machine of whoever ran them."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import assemble  # noqa: E402

FRAGMENTS = sorted((ROOT / "docs" / "benchmarks").glob("*.md"))
SCRIPTS = [p.name for p in sorted((ROOT / "benchmarks").glob("*.py")) if not p.name.startswith("_")]


def test_the_benchmark_page_is_its_fragments() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == assemble.assembled(), "run: python benchmarks/assemble.py"
    assert all(f.read_text(encoding="utf-8").strip() in page for f in FRAGMENTS)


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda f: f.name)
def test_a_fragment_names_its_command_and_no_path(fragment: Path) -> None:
    text = fragment.read_text(encoding="utf-8")
    assert text.startswith("## ")
    script = re.search(r"`python benchmarks/(\w+)\.py", text)
    assert script and f"{script[1]}.py" in SCRIPTS and fragment.stem.startswith(script[1])
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|Users|mnt)\b", text)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_readme_lists_every_script(script: str) -> None:
    assert f"`{script}`" in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
