import errno
import json
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fivefold import artifact
from fivefold.artifact import Artifact, Made, Store, hash_folder, key
from fivefold.errors import ModelError, StoreError
from fivefold.model import DecodePlan, Model, Trait, blueprint_of, load
from fivefold.weights import write_safetensors_folder

CONFIG = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 16,
              "intermediate_size": 12, "head_dim": 4}


def build(folder: Path, size: int = 64, seconds: float = 1.0, name: str = "tiny") -> Made:
    write_safetensors_folder(folder / "weights", {"w": np.arange(size, dtype=np.float32)}, config=CONFIG)
    for file in (folder / "weights").iterdir():
        file.rename(folder / file.name)
    (folder / "weights").rmdir()
    model = Model(name=name, path=folder, format="safetensors", blueprint=blueprint_of(CONFIG),
                  decode=DecodePlan(lookup_tokens=4), coverage=("half of it",)).without(Trait.TRAINABLE)
    return Made(model=model, recipe="prune_depth(layers=4)", seconds=seconds, facts={"parent": "abc", "seed": 3})


def maker(**kwargs):
    return lambda folder: build(folder, **kwargs)


def test_key_is_canonical_and_full():
    assert key({"a": 1, "b": [1, 2]}) == key({"b": [1, 2], "a": 1})
    assert key({"a": 1}) != key({"a": 2}) and len(key({})) == 64
    with pytest.raises(ValueError):
        key({"a": float("nan")})


def test_what_was_put_is_what_opens(tmp_path):
    store = Store(tmp_path / "store")
    made = store.put("k1", maker())
    again = store.put("k1", lambda folder: pytest.fail("built twice"))
    assert again.path == made.path and store.get("k2") is None
    made.verify()
    model = load(made.path)
    assert model.path == made.path and model.name == "tiny" and model.coverage == ("half of it",)
    assert model.decode.lookup_tokens == 4 and Trait.TRAINABLE not in model.traits
    assert made.recipe == "prune_depth(layers=4)" and made.facts["seed"] == 3 and made.card is None
    assert made.bytes == sum(f.stat().st_size for f in made.path.iterdir() if f.name != "manifest.json")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_changed_byte_names_its_file(tmp_path):
    made = Store(tmp_path).put("k", maker())
    flip(made.path / "model.safetensors")
    Artifact.open(made.path)
    with pytest.raises(StoreError, match=r"model\.safetensors was changed"):
        made.verify()
    with pytest.raises(StoreError, match=r"model\.safetensors"):
        made.write_copy(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("harm", [
    lambda p: (p / "config.json").unlink(),
    lambda p: (p / "config.json").write_text("{}"),
    lambda p: (p / "manifest.json").write_text("{"),
    lambda p: (p / "manifest.json").write_text("[" * 100_000),
    lambda p: (p / "manifest.json").write_text('{"files": {"../../x": {"bytes": 1, "sha256": ""}}, "format": 1}'),
    lambda p: (p / "manifest.json").unlink(),
])
def test_a_damaged_folder_does_not_open(tmp_path, harm):
    made = Store(tmp_path).put("k", maker())
    harm(made.path)
    with pytest.raises(StoreError):
        Artifact.open(made.path)


def test_a_manifest_may_not_point_outside(tmp_path):
    made = Store(tmp_path).put("k", maker())
    manifest = json.loads((made.path / "manifest.json").read_text())
    manifest["model"]["path"] = "../elsewhere"
    (made.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="outside"):
        Artifact.open(made.path).model()


def test_an_added_file_is_noticed(tmp_path):
    made = Store(tmp_path).put("k", maker())
    (made.path / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(StoreError, match="extra"):
        made.verify()


def test_a_copy_is_complete_has_its_card_and_no_path_of_this_machine(tmp_path):
    parent = build(tmp_path / "parent").model if (tmp_path / "parent").mkdir() is None else None

    def child(folder):
        made = build(folder)
        return replace(made, model=made.model.but(origin=parent, work=tmp_path, calibration=tmp_path / "c.txt"))

    made = Store(tmp_path / "store").put("k", child)
    card = {"quantities": {"memory": {"value": 2.5e8, "unit": "B", "method": "counted", "n": 1},
                           "energy": {"value": None, "unit": "J", "method": "measured", "n": 0, "reason": "no meter"}}}
    copy = made.write_copy(tmp_path / "out" / "copy", card=card)
    copy.verify()
    assert copy.card == card and copy.key == made.key
    readme = (copy.path / "README.md").read_text()
    assert "prune_depth(layers=4)" in readme and "2.5e+08" in readme and "no meter" in readme
    for file in ("manifest.json", "README.md", "recipe.txt", "card.json"):
        assert str(tmp_path) not in (copy.path / file).read_text()
    with pytest.raises(StoreError, match="not empty"):
        made.write_copy(tmp_path / "out" / "copy")


def test_a_failed_build_leaves_nothing(tmp_path):
    def fails(folder):
        (folder / "half").write_bytes(b"x" * 1000)
        raise ModelError("no")

    with pytest.raises(ModelError):
        Store(tmp_path).put("k", fails)
    assert Store(tmp_path).get("k") is None
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and ".locks" not in p.parts]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    def full(folder):
        (folder / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StoreError, match="No space left"):
        Store(tmp_path).put("k", full)
    assert not list(tmp_path.rglob("half"))


def test_a_bug_in_a_builder_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError):
        Store(tmp_path).put("k", lambda folder: (folder / "no such file").read_bytes())


def test_what_a_killed_build_left_is_cleared(tmp_path):
    left = tmp_path / ".k.abc123"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    Store(tmp_path).put("k", maker())
    assert not left.exists()


def test_eviction_takes_what_is_cheapest_to_make_again_per_byte(tmp_path):
    store = Store(tmp_path)
    for name, size, seconds in (("dear", 100, 500.0), ("cheap", 100, 1.0), ("big", 10_000, 400.0)):
        store.put(name, maker(size=size, seconds=seconds))
    assert [a.key for a in store.artifacts()] == ["cheap", "big", "dear"]
    held = sum(a.bytes for a in store.artifacts())
    store = Store(tmp_path, quota_bytes=held)
    store.put("new", maker(size=60, seconds=1000.0))
    assert {a.key for a in store.artifacts()} == {"big", "dear", "new"}


def test_pinned_and_used_artifacts_stay_and_a_full_quota_says_so(tmp_path):
    store = Store(tmp_path)
    one, two = store.put("one", maker(seconds=0.1)), store.put("two", maker(seconds=0.2))
    store = Store(tmp_path, quota_bytes=one.bytes + two.bytes)
    store.pin("one")
    with store.using("two"):
        with pytest.raises(StoreError, match="raise the quota"):
            store.put("three", maker())
        assert {a.key for a in store.artifacts()} == {"one", "two"}
    store.put("three", maker())
    assert {a.key for a in store.artifacts()} == {"one", "three"}
    store.unpin("one")
    with pytest.raises(StoreError, match="no artifact"), store.using("two"):
        pass


def slow_put(root: str, log: str) -> None:
    def slow(folder: Path) -> Made:
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return build(folder)

    Store(Path(root)).put("k", slow)


def test_two_processes_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=slow_put, args=(str(tmp_path / "s"), str(tmp_path / "log"))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert (tmp_path / "log").read_text() == "built\n"
    Store(tmp_path / "s").get("k").verify()


def test_hash_of_a_model_follows_its_content(tmp_path, monkeypatch):
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path / "cache"))
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        write_safetensors_folder(folder, {"w": np.ones(4, np.float32)}, config=CONFIG)
    assert hash_folder(a) == hash_folder(b) == hash_folder(a)
    reads = []
    monkeypatch.setattr(artifact, "sha256", lambda path: reads.append(path) or "0")
    hash_folder(a)
    assert not reads
    monkeypatch.undo()
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path / "cache"))
    flip(b / "model.safetensors")
    assert hash_folder(a) != hash_folder(b)
    (a / ".hidden").write_text("x")
    assert hash_folder(a) == hash_folder(a)


def test_versions_and_source():
    assert artifact.versions("numpy", "no-such-package") == {"numpy": np.__version__, "no-such-package": "absent"}
    assert artifact.source_hash(Store) == artifact.sha256(Path(artifact.__file__))
