"""The README is executed: its Python runs, its commands parse, its example of a technique is the real file."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from fivefold.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.S)
COMMANDS = sorted({
    line.split("   #")[0].strip().removeprefix("$ ")
    for language, block in BLOCKS if language == "" for line in block.splitlines()
    if re.match(r"(\$ )?fivefold ", line)
})


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command: str) -> None:
    _, verb, *arguments = shlex.split(command)
    group = typer.main.get_command(app)
    assert verb in group.commands, f"there is no verb {verb}"
    group.commands[verb].make_context(verb, arguments)


def test_the_python_runs() -> None:
    python = [block for language, block in BLOCKS if language == "python" and "import fivefold" in block]
    assert python
    for block in python:
        exec(compile(block, "README.md", "exec"), {})


def test_the_example_of_a_technique_is_the_real_file() -> None:
    shown = next(block for language, block in BLOCKS if language == "python" and "class Threads" in block)
    source = (ROOT / "src/fivefold/techniques/system/threads.py").read_text(encoding="utf-8")
    assert shown.strip() in source


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), f"README links to {target}, which is not there"
