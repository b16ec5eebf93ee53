"""The arrows of the house point one way, and the face of the package is light."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fivefold

ROOT = Path(fivefold.__file__).parent
GROUND = {"errors", "quantity", "metrics", "space", "paths", "files"}
CORE = GROUND | {"model", "recipe", "budget", "machine", "weights", "bundled", "artifact", "tokenizer", "workload",
                 "_smollm2"}
ALLOWED = {
    "errors": set(), "files": {"errors"}, "metrics": set(), "paths": {"errors"}, "quantity": GROUND, "space": GROUND,
    "model": GROUND | {"weights", "bundled", "artifact"}, "recipe": GROUND | {"model", "techniques"},
    "budget": GROUND, "machine": GROUND | {"model"}, "weights": GROUND | {"model"},
    "bundled": GROUND | {"model", "weights", "_smollm2"}, "_smollm2": GROUND | {"model", "weights", "bundled"},
    "artifact": GROUND | {"model", "weights"}, "tokenizer": GROUND | {"model"},
    "workload": GROUND | {"model", "tokenizer", "bundled"},
    "techniques": CORE | {"training", "engines", "export"}, "engines": CORE, "export": CORE | {"engines"},
    "training": CORE, "meters": CORE | {"engines"}, "tasks": CORE | {"engines"},
    "study": CORE | {"techniques", "engines", "export", "training", "meters", "tasks", "testing"},
    "report": GROUND | {"budget", "study"}, "serve": CORE | {"engines", "meters"},
    "testing": CORE | {"techniques", "study", "engines", "export", "meters", "tasks"},
    "verbs": None, "cli": None, "display": None, "__init__": None, "__main__": {"cli"},
}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def arrows(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules = [f"fivefold.{a.name}" if node.module == "fivefold" else node.module for a in node.names]
        elif isinstance(node, ast.Import):
            modules = [a.name for a in node.names]
        found |= {m.split(".")[1] for m in modules if m.startswith("fivefold.")}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    here = room(path)
    assert here in ALLOWED, f"{here} is a new room: say in ALLOWED what it may import"
    allowed = ALLOWED[here]
    if allowed is not None:
        strays = arrows(path) - allowed - {here}
        assert not strays, f"{path.relative_to(ROOT)} imports {sorted(strays)}, which {here} may not"


def test_techniques_do_not_import_each_other() -> None:
    for path in (ROOT / "techniques").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fivefold.techniques"):
                assert "_shared" in (node.module or ""), f"{path.name} imports {node.module}"


def test_the_report_reads_trial_records_only() -> None:
    for path in (ROOT / "report").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fivefold.study"):
                assert node.module == "fivefold.study.trial", f"{path.name} imports {node.module}"


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {"torch", "transformers", "optuna", "scipy", "peft", "fastapi", "pandas", "gguf", "pyarrow"}


def test_import_fivefold_loads_nothing_heavy() -> None:
    assert not loaded_by("import fivefold") & (HEAVY | {"numpy", "rich", "typer"})


@pytest.mark.parametrize("code", [
    "from fivefold import Recipe, load, Budget; Recipe.parse('threads(count=2)')",
    "import fivefold.machine, fivefold.artifact, fivefold.weights",
    "import fivefold.cli",
])
def test_the_core_loads_nothing_heavy(code: str) -> None:
    assert not loaded_by(code) & HEAVY


def test_every_public_name_resolves() -> None:
    for name in fivefold.__all__:
        assert getattr(fivefold, name) is not None


def test_every_room_has_its_sign() -> None:
    for path in ROOT.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path.relative_to(ROOT)} has no sign"
