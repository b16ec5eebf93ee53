from __future__ import annotations

from types import SimpleNamespace

import pytest

from fivefold import engines
from fivefold.errors import Misfit, MissingExtra, RecipeError
from fivefold.export import export
from fivefold.recipe import Recipe


@pytest.fixture
def narrow(monkeypatch):
    """An engine that reads GGUF files of q8_0 and f16 only."""
    fake = SimpleNamespace(FORMATS=("gguf",), EXTRA=None, GGUF_TYPES=("Q8_0", "F16"))
    real = engines.module
    monkeypatch.setattr(engines, "module", lambda name: fake if name == "narrow" else real(name))
    monkeypatch.setattr(engines, "names", lambda: ["llama.cpp", "narrow"])
    return fake


def test_an_engine_that_cannot_read_the_planned_format_is_refused_before_work(tiny):
    parent = tiny()
    with pytest.raises(Misfit, match=r'reads gguf, and this recipe makes safetensors; add gguf\(type="f16"\)'):
        Recipe.parse('engine(type="llama.cpp")').check(parent)
    assert Recipe.parse('engine(type="llama.cpp") + gguf(type="q4_0")').plan(parent).run.engine == "llama.cpp"
    assert not parent.work.exists()


def test_storage_types_the_engine_does_not_read_are_refused_before_work(tiny, narrow):
    parent = tiny()
    Recipe.parse('gguf(type="q8_0", embedding="f16") + engine(type="narrow")').check(parent)
    with pytest.raises(Misfit, match="reads GGUF files of f16, q8_0, not of q5_1"):
        Recipe.parse('gguf(type="q8_0", embedding="q5_1") + engine(type="narrow")').check(parent)
    assert not parent.work.exists()


def test_openvino_reads_some_storage_types(tiny):
    pytest.importorskip("openvino_genai")
    parent = tiny()
    Recipe.parse('gguf(type="q4_1", embedding="q8_0") + engine(type="openvino") + dtype(type="bfloat16")').check(parent)
    with pytest.raises(Misfit, match=r"reads GGUF files of f16, q4_0, q4_1, q8_0, not of q5_0"):
        Recipe.parse('gguf(type="q5_0") + engine(type="openvino")').check(parent)
    with pytest.raises(Misfit, match="openvino runs caches of"):
        Recipe.parse('gguf(type="q4_0") + engine(type="openvino") + kv_cache(type="q4_0")').check(parent)


def test_a_finished_file_is_judged_by_the_types_in_it(tiny, narrow, tmp_path):
    done = export(Recipe.parse('gguf(type="q4_0", importance=False)').apply(tiny()), tmp_path / "out")
    Recipe.parse('engine(type="llama.cpp")').check(done)
    with pytest.raises(Misfit, match="not of q4_0"):
        Recipe.parse('engine(type="narrow")').check(done)


def test_an_engine_that_is_not_installed_says_how_to_install_it(tiny, narrow):
    narrow.EXTRA = "no_such_package"
    with pytest.raises(MissingExtra, match=r"pip install 'fivefold\[no_such_package\]'"):
        Recipe.parse('gguf(type="q8_0") + engine(type="narrow")').check(tiny())


def test_unknown_engines_are_refused_with_the_nearest():
    with pytest.raises(RecipeError, match=r"did you mean 'llama\.cpp'"):
        Recipe.parse('engine(type="lamacpp")')
    with pytest.raises(RecipeError, match="engines: "):
        Recipe.parse('engine(type="")')
