"""The `train` command as a person meets it: from rows to a model, stopped in every way, and wrong in every way."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from failing import one_sentence, told, until
from fivefold.artifact import Artifact
from fivefold.model import load
from fivefold.testing import tiny_model
from fivefold.testing.tiny import tiny_examples

Capture = pytest.CaptureFixture[str]
STEPS = 24
SLOWLY = """
import functools, os, sys, time
from fivefold.study import watch
from fivefold.training import checkpoint

checkpoint.Keeper = functools.partial(checkpoint.Keeper, every=0.0)
heard = watch.Watch.__call__

def slow(self, step):
    time.sleep(float(os.environ.get("SLOW_STEPS", "0")))
    heard(self, step)

watch.Watch.__call__ = slow
from fivefold.cli import main
main(sys.argv[1:])
"""
"""The command with a checkpoint after every step, each step taking SLOW_STEPS seconds more."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny", layers=2, vocab=257, context=256).path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_examples(tmp_path_factory.mktemp("rows") / "rows.jsonl", 160)


def start(*arguments: str, code: str = "", **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "fivefold"]
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **environment},
    )


def run(*arguments: str, code: str = "", **environment: str) -> tuple[int, str, str]:
    child = start(*arguments, code=code, **environment)
    said, complained = child.communicate(timeout=300)
    return child.returncode, said, complained


def asked(model: Path, rows: Path, out: Path, *more: str) -> list[str]:
    return ["train", str(model), "--data", str(rows), "--out", str(out), "--tokens-per-step", "256", *more]


def stepped(model: Path, rows: Path, out: Path) -> list[str]:
    return asked(model, rows, out, "--steps", str(STEPS), "--recipe", "lora(rank=4, rate=0.01)")


def steps(out: Path) -> list[int]:
    log = out / "log.jsonl"
    found = []
    for line in log.read_text().splitlines() if log.is_file() else []:
        try:
            found.append(json.loads(line)["step"])
        except ValueError:
            continue
    return found


@pytest.fixture(scope="module")
def whole(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    code, _, complained = run(*stepped(model, rows, out), code=SLOWLY)
    assert (code, complained) == (0, "")
    return out


def test_from_rows_to_a_model(model: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, complained = run(*asked(
        model, rows, out, "--budget", "memory<=2GB, time<=1min", "--task", "accuracy", "--epochs", "3"))
    assert (code, complained) == (0, ""), "the libraries are silent"
    assert not re.search(r"(?i)warning|deprecated|shards|it/s|transformers|bitsandbytes", said)
    for needle in ("152 examples", "8 more held out, judged on 8 rows", "chosen", "memory of lora: process",
                   "~ modelled", "measuring in the serving engine", "numbers trained", "accuracy", "perplexity",
                   "against the parent:", "energy", "money", "memory forecast", "serve it   fivefold serve"):
        assert needle in said, needle
    bars = [line for line in said.splitlines() if re.search(r"[━╌] \d+/\d+  loss \d", line)]
    assert len(bars) >= 10 and all(
        all(unit in bar for unit in ("tokens/s", " MB", " J", "$", " s, ", "left")) for bar in bars)
    done = int(bars[-1].partition("/")[2].split()[0])
    assert steps(out) == list(range(1, done + 1))
    forecast = re.search(r"memory forecast .*\(([+-]\d+)%\)", said)
    assert forecast and abs(int(forecast[1])) <= 15
    artifact = Artifact.open(out / "model")
    artifact.verify()
    assert load(out / "model").traits == load(model).traits and artifact.card is not None
    assert re.search(r"(?m)^ship it    fivefold ship .* --to my-model$", said)
    code, said, complained = run("ship", str(out), "--to", str(tmp_path / "shipped"))
    assert (code, complained) == (0, "") and "shipped copy" in said and "same" in said and "DEPARTS" not in said
    assert Artifact.open(tmp_path / "shipped").card is not None


def test_the_folder_has_a_default(model: Path, rows: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fivefold", "train", str(model), "--data", str(rows), "--recipe", "bitfit",
               "--steps", "1"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300, check=False).returncode == 0
    assert (tmp_path / "runs" / "rows" / "model" / "card.json").is_file()


def test_help_is_clear() -> None:
    code, said, complained = run("train", "--help")
    assert (code, complained) == (0, "")
    text = " ".join(said.split())
    for needle in ('{"messages": [...]}', '{"prompt": ..., "completion": ...}', '{"text": ..., "label": ...}',
                   "memory<=2GB, time<=20min", "the same command goes on", "lora(rank=8)", "such as sst2"):
        assert needle in text, needle
    for option in re.findall(r"--[a-z-]+", said):
        described = re.search(rf"{option}\b(?: [A-Z]+)?(?:<?[^\n]*)?\s+\S", said)
        assert described, f"{option} has no help"


def test_killed_at_random_moments_the_same_command_ends_with_the_same_bytes(
    model: Path, rows: Path, whole: Path, tmp_path: Path
) -> None:
    out, rng, reached = tmp_path / "out", random.Random(0), 0
    for kill in range(5):
        child = start(*stepped(model, rows, out), code=SLOWLY, SLOW_STEPS="0.15")
        if kill:
            until(lambda reached=reached: len(steps(out)) > reached, child)  # type: ignore[misc]
        else:
            until(lambda: (out / ".lock").exists(), child)
        time.sleep(rng.random() * 0.6)
        assert child.poll() is None, "it ended by itself, so this was no kill"
        child.kill()
        child.communicate()
        found = steps(out)
        assert found == list(range(1, len(found) + 1)) and len(found) >= reached, "a step was lost"
        reached = len(found)
        (out / ".checkpoint.safetensors.0123.partial").write_bytes(b"half of it")
    code, said, complained = run(*stepped(model, rows, out), code=SLOWLY)
    assert (code, complained) == (0, "") and re.search(r"going on after step [1-9]", said)
    for name in ("model.safetensors", "delta/adapter_model.safetensors", "config.json"):
        assert (out / "model" / name).read_bytes() == (whole / "model" / name).read_bytes(), name
    assert steps(out) == list(range(1, STEPS + 1))
    assert not list(out.rglob("*.partial")) and {p.name for p in out.glob(".*")} == {".lock"}


def test_ctrl_c_stops_and_the_same_command_goes_on(model: Path, rows: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = start(*stepped(model, rows, out), code=SLOWLY, SLOW_STEPS="0.3")
    until(lambda: len(steps(out)) > 2, child)
    os.killpg(child.pid, signal.SIGINT)
    said, complained = child.communicate(timeout=60)
    assert child.returncode == 130
    assert complained.strip() == "fivefold: stopped; the same command goes on from the last checkpoint"
    code, said, complained = run(*stepped(model, rows, out), code=SLOWLY)
    assert (code, complained) == (0, "") and "going on after step" in said
    assert (out / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


def test_a_second_process_is_refused_and_the_first_unharmed(model: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(*stepped(model, rows, out), code=SLOWLY, SLOW_STEPS="0.5")
    until(lambda: len(steps(out)) > 0, first)
    code, _, complained = run(*stepped(model, rows, out))
    assert first.poll() is None, "the first was too fast for this test"
    assert code == 2
    one_sentence(complained, "another process trains in")
    assert first.communicate(timeout=120)[1] == "" and first.returncode == 0


def test_a_disk_that_fills_up_and_then_has_room(model: Path, rows: Path, whole: Path, tmp_path: Path) -> None:
    import resource

    out = tmp_path / "out"

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    child = subprocess.Popen([sys.executable, "-c", SLOWLY, *stepped(model, rows, out)], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, preexec_fn=limits,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    complained = child.communicate(timeout=120)[1]
    assert child.returncode == 2
    one_sentence(complained, "free space")
    assert not list(out.rglob("*.partial"))
    assert run(*stepped(model, rows, out), code=SLOWLY)[0] == 0
    assert (out / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


def test_nothing_fits(model: Path, rows: Path, tmp_path: Path) -> None:
    code, _, complained = run(*asked(model, rows, tmp_path / "out", "--budget", "memory<=100MB"))
    assert code == 3
    one_sentence(complained, "no way of fine-tuning fits 100 MB: the smallest, ")
    assert re.search(r"needs \d+ MB of memory; the largest part is the process itself \(\d+ MB\); allow \d+ MB$",
                     complained.strip())
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from fivefold.study import resident

    monkeypatch.setattr(resident, "added", lambda *given: resident.Added(1e8, 2e8))
    yield


ROW, OTHER_ROW = '{"prompt": "a", "completion": "b"}\n', '{"prompt": "c", "completion": "d"}\n'
FILES = [
    ("", "holds no rows"), ('{"text": "a", "label": "b"}\n{"text": "a"}\n', 'line 2 of rows.jsonl has no "label"'),
    ('{"prompt": "a"}\n', 'line 1 of rows.jsonl has no "completion"'), ("{\n", "line 1 of rows.jsonl is not JSON"),
    (ROW.replace("b", "word " * 300), "line 1 of rows.jsonl is"), (ROW, "1 distinct row"),
    ('{"text": "a", "label": "b"}\n{"text": "c", "label": "b"}\n', "one label 'b'"),
]
OPTIONS = [
    (["--task", "sst3"], "no task 'sst3'"), (["--test", "nothing.jsonl"], "nothing.jsonl cannot be read"),
    (["--test", "OTHER"], "line 1 of other.jsonl has the label 'maybe', which training did not see"),
    (["--budget", "memry<=2GB"], "did you mean memory?"), (["--budget", "memory<=2XB"], "has no unit of memory"),
    (["--budget", "time<=20"], "has no unit of time"), (["--budget", "memory>=2GB"], "write it like memory<=2GB"),
    (["--budget", "time<=1h, time<=2h"], "twice"), (["--budget", "latency<=20ms"], "write it like memory<=2GB"),
    (["--budget", "money<=$5min"], "has no unit of money"), (["--budget", "energy<=xWh"], "cannot read"),
    (["--recipe", 'gguf(type="q8_0")'], "gguf is none"), (["--recipe", "lora + threads(count=1)"], "threads is none"),
    (["--recipe", "lorra"], "did you mean lora?"), (["--recipe", "lora(ranks=2)"], "did you mean rank?"),
    (["--recipe", "lora + full"], "trained parameters not chosen"), (["--recipe", "parent"], "none was given"),
    (["--template", "no text"], "must hold {text} once"), (["--seed", "99999999999"], "seed is 99999999999"),
]
WRONG = [
    *((content, [], needle) for content, needle in FILES), *((None, *wrong) for wrong in OPTIONS),
    (ROW + OTHER_ROW, ["--task", "accuracy"], "has no labels"),
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("content", "more", "needle"), WRONG, ids=lambda value: str(value)[:24])
def test_bad_input_is_one_sentence_before_any_work(
    model: Path, rows: Path, tmp_path: Path, capfd: Capture, content: str | None, more: list[str], needle: str
) -> None:
    other, data = tmp_path / "other.jsonl", tmp_path / "rows.jsonl"
    other.write_text('{"text": "a fox", "label": "maybe"}\n')
    data.write_text(rows.read_text() if content is None else content)
    options = [str(other) if option == "OTHER" else option for option in more]
    code, said = told(capfd, asked(model, data, tmp_path / "out", *options))
    assert code == 2
    one_sentence(said, needle)
    assert not (tmp_path / "out" / "run.json").exists() and not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.usefixtures("quick")
def test_models_that_cannot_be_trained(model: Path, rows: Path, tmp_path: Path, capfd: Capture) -> None:
    import dataclasses

    from fivefold.export import export
    from fivefold.recipe import Recipe

    loaded = load(model)
    (tmp_path / "gguf").mkdir()
    plan = dataclasses.replace(loaded.export, format="gguf", default="q8_0")
    gguf = export(loaded.but(export=plan), tmp_path / "gguf").path
    (tmp_path / "work").mkdir()
    packed = Recipe.parse("int8").apply(loaded.but(work=tmp_path / "work"))
    code, said = told(capfd, asked(gguf, rows, tmp_path / "out"))
    assert code == 2
    one_sentence(said, "is a GGUF file and cannot be trained")
    code, said = told(capfd, asked(packed.path, rows, tmp_path / "out"))
    assert code == 2, said
    assert "Traceback" not in said and len(said.strip().splitlines()) == 1
    code, said = told(capfd, asked(Path("no-such-model"), rows, tmp_path / "out"))
    assert code == 2
    one_sentence(said.replace(": give", "; give"), "there is no model at")


@pytest.mark.usefixtures("quick")
def test_folders_that_cannot_be_used(model: Path, rows: Path, whole: Path, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    for out, needle in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "out", "cannot be made"),
                        (tmp_path / "full", "holds no training run"), (whole, "is finished"),
                        (Path("/proc/fivefold"), "cannot be made")):
        code, said = told(capfd, stepped(model, rows, out))
        assert code == 2
        one_sentence(said, needle)
    code, said = told(capfd, ["ship", str(tmp_path / "full"), "--to", str(tmp_path / "x")])
    assert code == 2 and "no study" in said


@pytest.mark.usefixtures("quick")
def test_ship_waits_for_the_end_of_a_run(whole: Path, tmp_path: Path, capfd: Capture) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.json").write_bytes((whole / "run.json").read_bytes())
    code, said = told(capfd, ["ship", str(begun), "--to", str(tmp_path / "x")])
    assert code == 2
    one_sentence(said, "is not finished")
    code, said = told(capfd, ["ship", str(whole), "--to", str(tmp_path / "x"), "--trial", "1"])
    assert code == 2
    one_sentence(said, "one model")
