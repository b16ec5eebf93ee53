"""How it must fail: one sentence with what, why and what to do, the right exit code, no traceback, nothing lost."""

from __future__ import annotations

import json
import resource
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from failing import Inputs, copied, make_inputs, one_sentence, told
from fivefold.artifact import Artifact
from fivefold.model import load
from fivefold.study.study import Study
from fivefold.study.trial import Outcome
from fivefold.weights import check_safetensors, gguf_header, write_safetensors

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("failing"))


@pytest.fixture(scope="module")
def run(inputs: Inputs) -> Path:
    """A finished study of the safetensors model with one shippable trial."""
    from fivefold.budget import Allowance, Budget
    from fivefold.recipe import catalogue
    from fivefold.study.optimize import optimize

    optimize(
        load(inputs.model), inputs.folder / "run", budget=Budget(), objectives=("latency", "size"), rounds=2,
        allowance=Allowance(), trials=2, techniques={"gguf": catalogue()["gguf"]}, text=str(inputs.text),
        workload=str(inputs.workload),
    )
    return inputs.folder / "run"


@pytest.fixture(autouse=True)
def never_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that should have been refused fails the test at once and does not wait for requests."""
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("it was served"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def scrawl(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:20] + b"\xff\xfe\xff\xfe\xff\xff\xff\xff" + data[28:])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def verb(inputs: Inputs, name: str, model: Path, tmp_path: Path) -> list[str]:
    return {
        "serve": ["serve", str(model), "--port", "0"],
        "measure": ["measure", str(model), *inputs.choices(), "--rounds", "1"],
        "optimize": inputs.optimize(model, tmp_path / "out"),
    }[name]


@pytest.mark.parametrize("name", ["serve", "measure", "optimize"])
@pytest.mark.parametrize("damage", [cut, scrawl, empty])
def test_damaged_weights(
    inputs: Inputs, tmp_path: Path, capfd: Capture, damage: Callable[[Path], None], name: str
) -> None:
    folder, file = copied(inputs.model, tmp_path / "a"), copied(inputs.gguf, tmp_path / "b")
    damage(folder / "model.safetensors")
    damage(file)
    for model in (folder, file):
        code, said = told(capfd, verb(inputs, name, model, tmp_path))
        assert code == 2
        one_sentence(said, "copy")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "needle"), [
    ({"hidden_size": 10**9}, "width = 1000000000"), ({"num_hidden_layers": -1}, "layers = -1"),
    ({"num_hidden_layers": "two"}, "layers = 'two'"), ({"vocab_size": 0}, "vocab = 0"),
    ({"num_key_value_heads": 5}, "does not divide"), ({"auto_map": {"AutoModel": "code.py"}}, "remote code"),
    ({"hidden_size": 128}, "config.json describes [320, 128]"), ({"num_hidden_layers": 1}, "describes 1 layers"),
    ({"num_hidden_layers": 3}, "lacks the weights model.layers.2"), ({"model_type": "nonsense"}, "nonsense"),
])
def test_a_config_that_cannot_be(
    inputs: Inputs, tmp_path: Path, capfd: Capture, change: dict[str, object], needle: str
) -> None:
    model = copied(inputs.model, tmp_path / "odd")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    code, said = told(capfd, verb(inputs, "serve", model, tmp_path))
    assert code == 2
    one_sentence(said, needle)


@pytest.mark.parametrize("name", ["serve", "measure", "optimize"])
def test_an_architecture_nobody_knows(inputs: Inputs, tmp_path: Path, capfd: Capture, name: str) -> None:
    file = copied(inputs.gguf, tmp_path / "odd")
    data = file.read_bytes()
    renamed = data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0llamb").replace(b"llama.", b"llamb.")
    file.write_bytes(renamed)
    code, said = told(capfd, verb(inputs, name, file, tmp_path))
    assert code == 2
    one_sentence(said, "unknown model architecture: 'llamb'")


@pytest.mark.parametrize("name", ["measure", "optimize"])
@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_weights_that_are_no_numbers(inputs: Inputs, tmp_path: Path, capfd: Capture, name: str, kind: str) -> None:
    if kind == "gguf":
        model = copied(inputs.gguf, tmp_path / "nan")
        norm = next(t for t in gguf_header(model).tensors if t.name == "output_norm.weight")
        data = bytearray(model.read_bytes())
        data[norm.offset : norm.offset + 4] = np.float32("nan").tobytes()
        model.write_bytes(bytes(data))
    else:
        model = copied(inputs.model, tmp_path / "nan")
        tensors = {n: t.numpy() for n, t in check_safetensors(model / "model.safetensors").items()}
        tensors["model.norm.weight"][0] = np.nan
        write_safetensors(model / "model.safetensors", tensors)
    code, said = told(capfd, verb(inputs, name, model, tmp_path))
    assert code == 2
    one_sentence(said, "NaN")


@pytest.mark.parametrize(("content", "needle"), [
    (b"", "holds no text"), (b"\xff\xfe\x00 caf\xe9", "not UTF-8"), (b"too short", "give a longer text"),
])
def test_a_text_that_cannot_be_used(
    inputs: Inputs, tmp_path: Path, capfd: Capture, content: bytes, needle: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    for arguments in (["measure", str(inputs.gguf), "--workload", str(inputs.workload), "--rounds", "1"],
                      inputs.optimize(inputs.gguf, tmp_path / "out")):
        code, said = told(capfd, [*arguments, "--text", str(text)])
        assert code == 2
        one_sentence(said, needle)


@pytest.mark.parametrize(("line", "needle"), [
    ("{", "line 2 of bad.jsonl is not JSON"), ('{"prompt": 3}', "line 2"), ("{}", "line 2"),
    ('{"prompt": "a", "max_tokens": 0}', "line 2"),
])
def test_a_bad_line_of_a_workload_is_named(
    inputs: Inputs, tmp_path: Path, capfd: Capture, line: str, needle: str
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    code, said = told(capfd, ["measure", str(inputs.gguf), "--workload", str(file)])
    assert code == 2
    one_sentence(said, needle)


@pytest.mark.parametrize("cap", ["1XB", "lots", "-1GB", "$3", "5min"])
def test_a_memory_cap_that_is_no_size(inputs: Inputs, tmp_path: Path, capfd: Capture, cap: str) -> None:
    code, said = told(capfd, inputs.optimize(inputs.gguf, tmp_path / "out", "--memory", cap))
    assert code == 2
    one_sentence(said, ";")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def impossible(inputs: Inputs) -> tuple[list[str], int, str]:
    """A command whose budget nothing meets, its exit code and what it said."""
    command = inputs.optimize(inputs.gguf, inputs.folder / "impossible", "--budget", "size<=1B")
    return command, *inputs.run(*command)


def test_nothing_meets_the_budget(impossible: tuple[list[str], int, str], inputs: Inputs) -> None:
    _, code, said = impossible
    assert code == 3 and "parent" in said and "relax size" in said and "Traceback" not in said
    assert (inputs.folder / "impossible" / "report.html").stat().st_size > 500
    assert Study.open(inputs.folder / "impossible").parent is not None


def test_a_folder_with_another_study(run: Path, inputs: Inputs, capfd: Capture) -> None:
    before = (run / "study.sqlite").read_bytes()
    code, said = told(capfd, inputs.optimize(inputs.model, run, "--seed", "7"))
    assert code == 2
    one_sentence(said, "give another folder")
    assert (run / "study.sqlite").read_bytes() == before


def test_a_study_of_another_version(
    impossible: tuple[list[str], int, str], capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fivefold.__version__", "0.0.1")
    code, said = told(capfd, impossible[0])
    assert code == 2
    one_sentence(said, "version")


def test_damaged_records(run: Path, tmp_path: Path, capfd: Capture) -> None:
    broken = tmp_path / "run"
    broken.mkdir()
    (broken / "study.sqlite").write_bytes(b"no database at all" * 100)
    for name in (["pick", str(broken)], ["explain", str(broken)], ["ship", str(broken), "--to", str(tmp_path / "x")]):
        code, said = told(capfd, name)
        assert code == 2
        one_sentence(said, "damaged")


def flip(file: Path) -> None:
    """One bit in the middle; size, time and name stay."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def shippable(run: Path) -> int:
    return next(t.number for t in Study.open(run).trials if t.artifact and t.outcome is Outcome.MEASURED)


def test_ship_refuses_an_artifact_changed_by_hand(run: Path, tmp_path: Path, capfd: Capture) -> None:
    shutil.copytree(run, tmp_path / "run")
    flip(next((tmp_path / "run" / "artifacts").glob("[!.]*/model.gguf")))
    ship = ["ship", str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--trial", str(shippable(run))]
    code, said = told(capfd, ship)
    assert code == 2
    one_sentence(said, "changed after the artifact was made")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["serve", "measure", "optimize"])
def test_a_flipped_bit_of_a_shipped_model_is_found(
    run: Path, inputs: Inputs, tmp_path: Path, capfd: Capture, name: str
) -> None:
    stored = Artifact.open(next((run / "artifacts").glob("[!.]*/manifest.json")).parent)
    stored.write_copy(tmp_path / "shipped")
    assert load(tmp_path / "shipped").format == "gguf"
    flip(tmp_path / "shipped" / "model.gguf")
    code, said = told(capfd, verb(inputs, name, tmp_path / "shipped", tmp_path))
    assert code == 2
    one_sentence(said, "changed after the artifact was made")


def test_a_departure_has_its_own_exit_code(
    run: Path, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fivefold.study.ship.ANSWERS", {"agreement": -1.0})
    code, said = told(capfd, ["ship", str(run), "--to", str(tmp_path / "out"), "--trial", str(shippable(run))])
    assert code == 4
    one_sentence(said, "departs from trial in agreement")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("hidden", "arguments", "line"), [
    ("fastapi", ["serve", "MODEL", "--port", "0"], "pip install 'fivefold[serve]'"),
    ("openvino,openvino_genai", ["measure", "MODEL", "--recipe", 'engine(type="openvino")'],
     "pip install 'fivefold[openvino]'"),
])
def test_a_missing_extra_tells_its_line(inputs: Inputs, hidden: str, arguments: list[str], line: str) -> None:
    more = inputs.choices() if arguments[0] == "measure" else []
    code, said = inputs.run(*(str(inputs.model) if a == "MODEL" else a for a in arguments), *more, HIDE=hidden)
    assert code == 2
    one_sentence(said, line)


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Callable[[str], None]]:
    """A file system on `folder`; yields a function that mounts it again with other options. Skips where not allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def is_whole(out: Path) -> None:
    """The records are readable and nothing half-written lies about."""
    with closing(sqlite3.connect(out / "study.sqlite")) as base:
        assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert not list(out.rglob("*.partial"))


def test_a_full_disk_and_then_more_room(inputs: Inputs, tmp_path: Path) -> None:
    if not shutil.which("mount"):
        pytest.skip("there is no mount here")
    command = inputs.optimize(inputs.gguf, tmp_path / "disk" / "out")
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=400k", "tmpfs") as again:
        code, said = inputs.run(*command)
        assert code == 2
        one_sentence(said, "free")
        again("size=100m")
        code, said = inputs.run(*command)
        assert (code, said) == (0, "")
        is_whole(tmp_path / "disk" / "out")


@pytest.mark.parametrize("kilobytes", [8, 60, 300])
def test_files_that_may_not_grow(inputs: Inputs, tmp_path: Path, kilobytes: int) -> None:
    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, kilobytes << 10))

    code, said = inputs.run(*inputs.optimize(inputs.gguf, tmp_path / "out"), limits=limits)
    assert code == 2
    one_sentence(said, "free")
    assert not list(tmp_path.rglob("*.partial"))


def test_a_read_only_folder(inputs: Inputs, run: Path, tmp_path: Path, capfd: Capture) -> None:
    if not shutil.which("mount"):
        pytest.skip("there is no mount here")
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=50m", "tmpfs") as again:
        shutil.copytree(run, tmp_path / "disk" / "run")
        again("ro")
        code, said = told(capfd, inputs.optimize(inputs.gguf, tmp_path / "disk" / "out"))
        assert code == 2
        one_sentence(said, "Read-only file system")
        code, said = told(capfd, ["pick", str(tmp_path / "disk" / "run")])
        assert code == 0, said
        ship = ["ship", str(run), "--to", str(tmp_path / "disk" / "x"), "--trial", str(shippable(run))]
        code, said = told(capfd, ship)
        assert code == 2
        one_sentence(said, "Read-only file system")


def test_a_cache_that_cannot_be(inputs: Inputs) -> None:
    code, said = inputs.run("measure", str(inputs.gguf), *inputs.choices(), FIVEFOLD_CACHE=str(inputs.text / "x"))
    assert code == 2
    one_sentence(said, "set FIVEFOLD_CACHE")
