"""Join docs/benchmarks/*.md into docs/benchmarks.md.

    python benchmarks/assemble.py
"""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
FRAGMENTS = DOCS / "benchmarks"
ORDER = ("serving", "quantization", "repair", "study", "search", "engine_overhead", "serve_load")
PREFACE = """# Benchmarks

Every section names the script of `benchmarks/` that writes it, with machine and date. Ratios are taken within a round,
then their median over the rounds, so that a machine that drifts is in both sides; brackets are 95 % intervals (with
fewer than 6 rounds: the full range). A goal stands beside its result also where it was missed. Times move with the
machine: run the commands on yours.
"""


def assembled() -> str:
    """The page: the preface, then the fragments in `ORDER`, others after them by name."""
    found = {file.stem: file.read_text(encoding="utf-8").strip() for file in sorted(FRAGMENTS.glob("*.md"))}
    names = [*(n for n in ORDER if n in found), *(n for n in found if n not in ORDER)]
    return "\n".join([PREFACE, *(f"{found[name]}\n" for name in names)])


def assemble() -> None:
    (DOCS / "benchmarks.md").write_text(assembled(), encoding="utf-8")


if __name__ == "__main__":
    assemble()
