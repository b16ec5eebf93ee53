"""OpenVINO's cache in llama.cpp: against llama.cpp's own prefill, and against torch."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fivefold.engines import Sampling, _handover, llama_cpp, module, names, openvino, torch_
from fivefold.errors import DataError, MissingExtra, ModelError
from fivefold.export import export
from fivefold.model import DecodePlan, Model
from fivefold.testing import tiny_model
from fivefold.weights import read_tensors, write_safetensors

NAME = "openvino+llama.cpp"
engine = module(NAME)


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 300, length).tolist()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    pytest.importorskip("openvino_genai")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIVEFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def parent(folder: Path, family: str = "llama", width: int = 64) -> Model:
    """A tiny model whose weights are half-precision numbers, so that F16 loses nothing."""
    model = tiny_model(folder, family, width=width)
    tensors = {name: t.numpy().astype(np.float16).astype(np.float32) for name, t in read_tensors(model.path)}
    write_safetensors(model.path / "model.safetensors", tensors)
    return model


def exported(model: Model, folder: Path, storage: str = "f16", **run: Any) -> Model:
    done = export(model.but(export=replace(model.export, format="gguf", default=storage)), folder / storage)
    return done.but(run=replace(done.run, engine=NAME, threads=1, **run))


@pytest.fixture(scope="module")
def torch_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return parent(tmp_path_factory.mktemp("parent"))


@pytest.fixture(scope="module")
def model(torch_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return exported(torch_model, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def session(model: Model) -> Iterator[Any]:
    opened = engine.open(model)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def reference(model: Model) -> Iterator[Any]:
    opened = llama_cpp.open(model)
    yield opened
    opened.close()


@pytest.fixture
def never_prefilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp may not read a prompt."""

    def refuse(*_: Any) -> None:
        raise AssertionError("llama.cpp was given the prompt")

    monkeypatch.setattr(llama_cpp.Context, "prefill", refuse)


def test_the_folder_names_it_after_both_engines() -> None:
    assert NAME in names() and "_handover" not in " ".join(names())


def test_without_the_package_the_install_line_is_told(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'fivefold\[openvino\]'"):
        engine.open(model)


@pytest.mark.parametrize("length", [64, 255, 256, 257, 600])
def test_greedy_text_equals_llama_cpp(
    session: Any, reference: Any, length: int, request: pytest.FixtureRequest
) -> None:
    want = list(reference.generate(text(length), 40))
    request.getfixturevalue("never_prefilled")
    assert list(session.generate(text(length), 40)) == want


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("cache_type", "dtype", "most"),
    [("f32", "float32", 2e-5), ("f16", "float32", 2e-5), ("bf16", "float32", 1e-4), ("q8_0", "float32", 5e-4),
     ("q4_0", "float32", 0.04), ("f16", "bfloat16", 1e-3)],
)
def test_scores_over_a_handed_cache_are_those_of_llama_cpp(
    family: str, cache_type: str, dtype: Any, most: float, tmp_path: Path
) -> None:
    """Heads of 128 elements: wide enough that llama.cpp rotates what it quantizes."""
    made = exported(parent(tmp_path / "m", family, width=256), tmp_path, cache_type=cache_type, dtype=dtype)
    ids = text(300)
    plain, handed = llama_cpp.open(made), engine.open(made)
    want, got = plain.score(ids), handed.score(ids)
    assert got.shape == want.shape and got.dtype == np.float32
    divergence = (np.exp(want) * (want - got)).sum(1)
    assert divergence[150:].mean() < most
    assert divergence[:150].mean() < 0.2, "OpenVINO reads over its own half-precision cache"
    assert handed._layout.rotations[0] == (128 if cache_type.startswith("q") else 0)
    assert handed._layout.transposed == (cache_type != "q8_0" and cache_type != "q4_0")


def test_scores_equal_torch(torch_model: Model, session: Any) -> None:
    for length in (100, 128, 700):
        want, got = torch_.open(torch_model).score(text(length)), session.score(text(length))
        assert np.abs(got - want).max() < 0.02


@pytest.mark.parametrize("storage", ["q8_0", "q4_0"])
def test_quantized_files(torch_model: Model, storage: str, tmp_path: Path) -> None:
    made = exported(torch_model, tmp_path, storage)
    want, got = llama_cpp.open(made).score(text(300)), engine.open(made).score(text(300))
    assert (np.exp(want) * (want - got)).sum(1).mean() < 0.003


def test_a_short_prompt_is_read_by_llama_cpp(session: Any, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("OpenVINO was given the prompt")

    monkeypatch.setattr(openvino.OpenVINOSession, "read", refuse)
    short = text(engine.SHORT - 1)
    assert list(session.generate(short, 10)) == list(reference.generate(short, 10))
    np.testing.assert_allclose(session.score(short), reference.score(short), atol=0.01)
    with pytest.raises(AssertionError, match="OpenVINO"):
        next(session.generate([*short, 1], 10))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5, seed=1)], ids=["greedy", "drawn"])
def test_prompt_lookup_changes_nothing(model: Model, session: Any, sampling: Sampling) -> None:
    quick = engine.open(model.but(decode=DecodePlan(lookup_ngram=1, lookup_tokens=5)))
    prompt = [5, 17, 33, 5, 17, 40, 41, 5, 17] * 10
    assert list(quick.generate(prompt, 60, sampling)) == list(session.generate(prompt, 60, sampling))
    assert quick.describe()["lookup_tokens"] == 5


def test_a_batch_equals_one_by_one(model: Model, session: Any, reference: Any) -> None:
    prompts = [text(n, seed=n) for n in (300, 3, 64, 100, 90)]
    alone = [list(session.generate(prompt, 12)) for prompt in prompts]
    assert session.generate_batch(prompts, 12) == alone == reference.generate_batch(prompts, 12)
    pairs = engine.open(model.but(run=replace(model.run, batch=2)))
    assert pairs.generate_batch(prompts, 12) == alone


def test_calls_do_not_disturb_each_other(session: Any) -> None:
    first, second = text(200, 1), text(90, 2)
    want, scored = list(session.generate(first, 10)), session.score(second * 2)
    assert len(list(session.generate(second, 30))) == 30
    early = session.generate(second, 10)
    next(early)
    early.close()
    assert list(session.generate(first, 10)) == want
    np.testing.assert_array_equal(session.score(second * 2), scored)
    stale = session.generate(first, 10)
    next(stale)
    session.score(second)
    with pytest.raises(RuntimeError, match="another call"):
        next(stale)
    stop = want[4]
    assert list(session.generate(first, 10, Sampling(stop=frozenset({stop})))) == want[: want.index(stop)]


def test_bad_tokens_describe_and_close(model: Model) -> None:
    opened = engine.open(model)
    for bad in ([], [-1], [opened.vocab] * 80):
        for call in (opened.score, lambda t: opened.generate(t, 3), lambda t: opened.generate_batch([t], 3)):
            with pytest.raises(DataError, match="token ids"):
                call(bad)
    with pytest.raises(DataError, match="context"):
        opened.generate(text(100), 4000)
    said = opened.describe()
    assert (said["engine"], said["threads"], said["prefill"]["engine"]) == (NAME, 1, "openvino")
    assert "openvino " in said["version"] and "xllamacpp " in said["version"]
    assert said["weight_bytes"] > 0 and said["prefill"]["weight_bytes"] > 0
    opened.close()
    with pytest.raises(RuntimeError, match="closed"):
        opened.generate(text(100), 3)
    with pytest.raises(RuntimeError, match="closed"):
        opened.score(text(200))


@pytest.mark.parametrize("storage", ["q5_0", "q4_1"])
def test_types_that_the_engines_read_differently_are_refused(torch_model: Model, storage: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"reads GGUF matrices of F16, Q8_0, Q4_0.* holds {storage.upper()}") as caught:
        engine.open(exported(torch_model, tmp_path, storage))
    assert "\n" not in str(caught.value)


def test_another_order_of_elements_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    right = _handover.layout_of
    monkeypatch.setattr(_handover, "layout_of", lambda *a, **k: right(*a, **{**k, "paired": False}))
    with pytest.raises(ModelError, match=r"the keys of layer 0 .* apart"):
        engine.open(model)


def test_other_rotary_frequencies_are_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float16 frequencies, which OpenVINO takes for an F16 file, show at the far end of the context."""
    monkeypatch.setattr(openvino, "_with_exact_rotation", lambda graph, base: graph)
    with pytest.raises(ModelError, match=r"the keys of layer 0 .* apart"):
        engine.open(model)


def saved_state(opened: Any, cells: int) -> np.ndarray:
    context = opened._fitting(cells)
    context.prefill(np.asarray(text(cells), np.int32))
    return context.state()


def test_a_frame_that_is_not_known_is_refused(session: Any) -> None:
    saved, layout = saved_state(session, 5), session._layout
    _handover.check(layout, saved, saved, 5, 0)
    for place in (0, 4, 8, 12, 16, 20, 76, 80, 92, 96):
        wrong = saved.copy()
        wrong[place] += 1
        with pytest.raises(ModelError, match="not known here"):
            _handover.check(layout, wrong, saved, 5, 0)
    for size in (10, len(saved) - 4, len(saved) + 4):
        with pytest.raises(ModelError, match="not known here"):
            _handover.check(layout, np.resize(saved, size), saved, 5, 0)
    with pytest.raises(ModelError, match="not known here"):
        _handover.layout_of(saved[:40], 5, layers=3, width=32, kind=layout.kind, paired=True)


def test_a_state_of_another_shape_is_not_taken(session: Any, reference: Any) -> None:
    saved = saved_state(reference, 5)
    context = reference._fitting(5)
    saved[8] = 7
    with pytest.raises(ModelError, match="refuses a cache"):
        context.restore(saved)


def test_hadamard_matrices_are_orthonormal_and_symmetric() -> None:
    from scipy.linalg import hadamard

    for n in (1, 2, 64, 128):
        matrix = _handover.hadamard(n)
        np.testing.assert_allclose(matrix, hadamard(n) / np.sqrt(n), atol=1e-6)
        np.testing.assert_allclose(matrix @ matrix, np.eye(n), atol=1e-5)


def test_half_a_cache_is_not_packed(session: Any) -> None:
    parts = list(session._reader.cache())
    with pytest.raises(ModelError, match=r"cache of 5 parts, not 6"):
        session._layout.packed(parts[1:], parts[0][2].shape[1])
