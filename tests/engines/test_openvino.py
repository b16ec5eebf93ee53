"""The OpenVINO engine against the torch engine on the same (half precision) weights."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fivefold.engines import Sampling, _openvino_ir, openvino, torch_
from fivefold.errors import DataError, MissingExtra, ModelError
from fivefold.export import export
from fivefold.model import DecodePlan, Model
from fivefold.testing import tiny_model
from fivefold.weights import read_tensors, write_safetensors

PROMPT = [5, 17, 33, 5, 17, 40, 41, 5, 17]
IDS = np.random.default_rng(0).integers(0, 300, 200).tolist()


def test_without_the_package_the_install_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'fivefold\[openvino\]'"):
        openvino.open(tiny_model(tmp_path))


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model whose weights are half-precision numbers, so that F16 loses nothing."""
    pytest.importorskip("openvino_genai")
    model = tiny_model(tmp_path_factory.mktemp("parent"))
    tensors = {name: t.numpy().astype(np.float16).astype(np.float32) for name, t in read_tensors(model.path)}
    write_safetensors(model.path / "model.safetensors", tensors)
    return model


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FIVEFOLD_CACHE", str(folder))
        yield folder


def exported(parent: Model, folder: Path, storage: str) -> Model:
    model = export(parent.but(export=replace(parent.export, format="gguf", default=storage)), folder / storage)
    return model.but(run=replace(model.run, engine="openvino", threads=1))


@pytest.fixture(scope="module")
def model(parent: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return exported(parent, tmp_path_factory.mktemp("gguf"), "f16")


@pytest.fixture(scope="module")
def session(model: Model) -> openvino.OpenVINOSession:
    return openvino.open(model)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loss(scored: np.ndarray) -> float:
    return float(-scored[np.arange(len(IDS) - 1), IDS[1:]].mean())


def test_scores_equal_torch_on_the_same_weights(
    parent: Model, session: openvino.OpenVINOSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = torch_.open(parent).score(IDS)
    got = session.score(IDS)
    assert got.shape == want.shape
    assert np.abs(got - want).max() < 0.02
    assert abs(loss(got) - loss(want)) < 2e-4
    monkeypatch.setattr(openvino, "SCORED", 7)
    assert np.abs(session.score(IDS) - got).max() < 0.01


def test_far_positions_are_turned_as_exactly_as_near_ones(parent: Model, session: openvino.OpenVINOSession) -> None:
    """OpenVINO's own frequencies are float16 here; from the second chunk on the cache is half precision too."""
    ids = np.random.default_rng(1).integers(0, 300, 1000).tolist()
    apart = np.abs(session.score(ids) - torch_.open(parent).score(ids)).max(1)
    assert apart[: openvino.SCORED].max() < 2e-5
    assert apart.max() < 0.001


def test_greedy_text_equals_torch(parent: Model, session: openvino.OpenVINOSession) -> None:
    reference = torch_.open(parent)
    assert list(session.generate(PROMPT, 30)) == list(reference.generate(PROMPT, 30))
    prompts = [PROMPT, PROMPT[:3], [40], PROMPT * 2]
    assert session.generate_batch(prompts, 12) == [list(session.generate(p, 12)) for p in prompts]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5, seed=1)], ids=["greedy", "drawn"])
def test_masked_drafts_change_nothing(model: Model, session: openvino.OpenVINOSession, sampling: Sampling) -> None:
    fast = openvino.open(model.but(decode=DecodePlan(lookup_ngram=1, lookup_tokens=5)))
    prompt = PROMPT * 5
    assert list(fast.generate(prompt, 60, sampling)) == list(session.generate(prompt, 60, sampling))


def test_quantized_files_are_close_to_their_own_weights(parent: Model, tmp_path: Path) -> None:
    want = torch_.open(parent).score(IDS)
    distance = {}
    for storage in ("q8_0", "q4_0"):
        got = openvino.open(exported(parent, tmp_path, storage)).score(IDS)
        distance[storage] = float((np.exp(want) * (want - got)).sum(1).mean())
    assert 0 < distance["q8_0"] < 0.002 < distance["q4_0"] < 0.1


def test_the_file_is_converted_once_and_keeps_its_folder_clean(model: Model, cache: Path) -> None:
    before = sorted(p.name for p in model.path.parent.iterdir())
    file = _openvino_ir.converted(model.path)
    first = file.stat().st_mtime_ns
    assert file.is_relative_to(cache)
    assert sorted(p.name for p in file.parent.iterdir()) == ["openvino_model.bin", "openvino_model.xml"]
    assert _openvino_ir.converted(model.path).stat().st_mtime_ns == first
    assert sorted(p.name for p in model.path.parent.iterdir()) == before
    assert not any(name.startswith("openvino") for name in before)


def test_other_storage_types_and_cache_types_are_refused(parent: Model, model: Model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds Q5_0"):
        openvino.open(exported(parent, tmp_path, "q5_0"))
    with pytest.raises(ModelError, match="cache of type iq4_nl"):
        openvino.open(model.but(run=replace(model.run, cache_type="iq4_nl")))


def test_an_architecture_it_cannot_read_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("openvino_genai")
    with pytest.raises(ModelError, match="families") as caught:
        openvino.open(exported(tiny_model(tmp_path / "m", "gpt2"), tmp_path, "f16"))
    assert "\n" not in str(caught.value)


def test_bad_tokens_and_closed_sessions(model: Model, session: openvino.OpenVINOSession) -> None:
    for bad in ([], [-1], [session.vocab]):
        with pytest.raises(DataError, match="token ids"):
            session.score(bad)
    with pytest.raises(DataError, match="context"):
        session.generate(PROMPT, 4000)
    described = session.describe()
    assert (described["engine"], described["threads"], described["dtype"]) == ("openvino", 1, "float32")
    other = openvino.open(model)
    other.close()
    with pytest.raises(RuntimeError, match="closed"):
        other.score([1])


def test_no_telemetry_is_loaded_with_openvino() -> None:
    code = (
        "import sys, fivefold.engines.openvino as engine\n"
        "engine.OpenVINOSession = lambda model, **_: None\n"
        "engine.open(None)\n"
        "import openvino, openvino.tools.ovc\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
