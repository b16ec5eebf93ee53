"""The command line as a person meets it: bad input is one sentence on standard error and exit code 2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fivefold.testing import tiny_model


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fivefold", *arguments], capture_output=True, text=True, timeout=300,
        env={**os.environ, **environment}, check=False,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    tiny_model(folder)
    return str(folder)


@pytest.mark.parametrize(("arguments", "needle"), [
    (["plan", "MODEL", "--budget", "memory<=260XB"], "unit 'XB'"),
    (["plan", "MODEL", "--budget", "memry<=260MB"], "did you mean memory"),
    (["plan", "MODEL", "--minimize", "latenc"], "did you mean latency"),
    (["plan", "MODEL", "--allowance", "8 parsecs"], "allowance"),
    (["plan", "MODEL", "--budget", "accuracy>=0.9x"], "add --task piqa"),
    (["plan", "MODEL", "--task", "piqaa"], "piqa"),
    (["plan", "MODEL", "--budget", "flips<=5%"], "add --task piqa"),
    (["plan", "MODEL", "--budget", "after_attack>=0.5"], "use fivefold compare"),
    (["measure", "MODEL", "--attack", "4"], "add --task sst2"),
    (["compare", "MODEL", "MODEL", "--attack", "4"], "add --task sst2"),
    (["plan", "no-such-model"], "bundled name"),
    (["plan", "MODEL", "--workload", "nothing.jsonl"], "nothing.jsonl"),
    (["optimize", "MODEL", "--out", "OUT", "--sampler", "magic", "--text", "README"], "magic"),
    (["measure", "MODEL", "--recipe", "thread(count=1)"], "did you mean threads"),
    (["measure", "MODEL", "--recipe", 'gguf(type="q8_0")'], "run-time techniques only"),
    (["pick", "OUT"], "no study"), (["explain", "OUT"], "no study"), (["ship", "OUT", "--to", "X"], "no study"),
    (["catalogue", "gguff"], "did you mean gguf"),
    (["serve", "MODEL", "--host", "0.0.0.0"], "key"),
])
def test_bad_input_is_one_sentence(model: str, tmp_path: Path, arguments: list[str], needle: str) -> None:
    names = {"MODEL": model, "OUT": str(tmp_path / "out"), "X": str(tmp_path / "x"), "README": model + "/config.json"}
    done = run(*(names.get(a, a) for a in arguments))
    assert done.returncode == 2, done.stderr
    assert needle in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_corrupted_model_is_one_sentence(model: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(model).iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    done = run("measure", str(broken))
    assert done.returncode == 2 and "truncated" in done.stderr and "Traceback" not in done.stderr


def test_help_names_every_verb() -> None:
    done = run("--help")
    for verb in ("doctor", "measure", "plan", "optimize", "pick", "explain", "compare", "ship", "serve", "catalogue"):
        assert verb in done.stdout


def test_catalogue_and_one_entry() -> None:
    assert "prune_depth" in run("catalogue").stdout
    assert re.search(r"^count +1 to 512 +required +Threads", run("catalogue", "threads").stdout, re.M)


def test_no_write_permission_is_one_sentence(model: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run("optimize", model, "--out", str(tmp_path / "file" / "out"), "--allowance", "1s")
    assert done.returncode == 2 and "Traceback" not in done.stderr
