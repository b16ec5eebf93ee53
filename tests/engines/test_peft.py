"""peft and bitsandbytes come in silence, and nothing that adapters do opens a connection."""

import subprocess
import sys
from pathlib import Path

from fivefold.model import Model
from fivefold.testing import tiny_model
from fivefold.testing.tiny import tiny_examples

CLOSED = """
import socket
def refused(*_, **__): raise AssertionError("a connection was tried")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refused
"""
FAKE = """
def get_kernel(*_, **__): raise AssertionError("a kernel was fetched")
"""
WORK = """
import sys, dataclasses
from pathlib import Path
from fivefold.engines import open_session
from fivefold.export import export
from fivefold.model import load
from fivefold.recipe import Recipe
folder = Path(sys.argv[1])
model = load(folder / "model")
model = model.but(train=dataclasses.replace(model.train, data=folder / "rows.jsonl", steps=2, tokens_per_step=256))
for recipe in sys.argv[2:]:
    work = folder / recipe.split("(")[0]
    session = open_session(export(Recipe.parse(recipe).apply(model.but(work=work)), work / "out"))
    assert len(list(session.generate([5, 6, 7], 4))) == 4
"""
RECIPES = ("lora", "dora", "adalora", "ia3", "qlora", "prefix", "houlsby")


def told(code: str, *arguments: str, path: Path | None = None) -> tuple[str, str]:
    """(stdout, stderr) of a fresh interpreter."""
    places = [str(path)] if path else []
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", f"import sys; sys.path[:0] = {places}\n{code}",
         *arguments], capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_it_is_imported_without_a_word_and_without_what_would_fetch_code(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(FAKE, encoding="utf-8")
    code = "from fivefold.engines._peft import peft\nimport logging, os, sys\nprint(peft().__name__, 'bitsandbytes' in"
    code += " sys.modules, os.environ['HF_HUB_OFFLINE'])\nimport kernels\nkernels.get_kernel.__name__\n"
    code += "assert logging.getLogger('bitsandbytes.backends.cpu.ops').level == logging.NOTSET"
    assert told(CLOSED + code, path=tmp_path) == ("peft True 1\n", "")


def test_training_and_serving_adapters_opens_no_connection_and_says_nothing(tmp_path: Path) -> None:
    model: Model = tiny_model(tmp_path / "model", layers=2)
    tiny_examples(tmp_path / "rows.jsonl")
    assert told(CLOSED + WORK, str(model.path.parent), *RECIPES) == ("", "")
