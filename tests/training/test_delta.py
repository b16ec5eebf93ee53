"""Sparse differences: exact, of their true size, added in any order, and refused where they do not belong."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from fivefold.errors import DataError, ModelError
from fivefold.training.delta import Delta, Sparse, changed, compose
from fivefold.weights import write_safetensors


def tensor(seed: int, *shape: int) -> np.ndarray:
    """float32 over twelve orders of magnitude."""
    draw = np.random.default_rng(seed)
    return (draw.standard_normal(shape) * 10.0 ** draw.uniform(-9, 3, shape)).astype(np.float32)


def sparse(entries: dict, parent: str = "parent") -> Sparse:
    return Sparse(parent=parent, entries={n: (np.array(i, np.int32), np.array(v, np.float32))
                                          for n, (i, v) in entries.items()})


def few(seed: int, names: str = "ab", size: int = 1000, k: int = 50) -> Sparse:
    draw = np.random.default_rng(seed)
    return sparse({n: (np.sort(draw.choice(size, k, replace=False)), tensor(seed, k)) for n in names})


def test_a_difference_is_where_two_tensors_differ() -> None:
    before, after = tensor(0, 20, 30), tensor(0, 20, 30)
    after[3, 7], after[19, 29] = 5.0, -2.0
    index, value = changed(before, after)
    assert index.tolist() == [3 * 30 + 7, 599] and index.dtype == np.int32
    assert value.tolist() == [np.float32(5) - before[3, 7], np.float32(-2) - before[19, 29]]
    assert [len(part) for part in changed(before, before)] == [0, 0]


def test_the_whole_is_kept_where_listing_positions_would_take_more() -> None:
    before = np.zeros(10, np.float32)
    after = before.copy()
    after[:5] = 1
    assert len(changed(before, after)[0]) == 5
    after[9] = 1
    index, value = changed(before, after)
    assert index.tolist() == list(range(10)) and value.tolist() == after.tolist()


def test_file_and_memory_give_the_same_bits(tmp_path: Path) -> None:
    parent = {"a": tensor(1, 40, 50), "b": tensor(2, 7), "c": tensor(3, 9)}
    after = {name: t.copy() for name, t in parent.items()}
    after["a"].reshape(-1)[::17] = tensor(4, 118)
    after["b"][:] = tensor(5, 7)
    made = Sparse(parent="p", entries={name: changed(parent[name], after[name]) for name in parent})
    defined = {name: made.added(name, parent[name]) for name in parent}
    loaded = Sparse.load(made.save(tmp_path / "delta.safetensors"))
    applied = loaded.apply(parent, "p")
    assert loaded.parent == "p" and loaded.count == made.count == 118 + 7
    for name in parent:
        assert applied[name].tobytes() == defined[name].tobytes()
        assert defined[name].dtype == np.float32 and defined[name].shape == parent[name].shape
        far = np.abs(defined[name].astype(np.float64) - after[name])
        assert (far <= np.maximum(np.abs(parent[name]), np.abs(after[name])) * 2.0**-23).all()
    assert applied["c"].tobytes() == parent["c"].tobytes()
    assert not np.shares_memory(applied["a"], parent["a"])


def test_the_file_is_as_large_as_what_changed(tmp_path: Path) -> None:
    scattered = few(0, names="a", size=100_000, k=5000).save(tmp_path / "scattered").stat().st_size
    whole = sparse({"a": (range(5000), tensor(0, 5000))}).save(tmp_path / "whole").stat().st_size
    assert 8 * 5000 < scattered < 8 * 5000 + 500
    assert 4 * 5000 < whole < 4 * 5000 + 500


def test_nothing_learned_is_a_difference_too(tmp_path: Path) -> None:
    loaded = Sparse.load(sparse({"a": ([], []), "b": ([], [])}).save(tmp_path / "none"))
    assert loaded.count == 0 and set(loaded.entries) == {"a", "b"}
    given = tensor(0, 4)
    assert loaded.apply({"a": given, "b": given}, "parent")["a"].tolist() == given.tolist()
    assert compose([loaded, loaded]).count == 0


def test_a_sum_is_the_same_bits_in_any_order() -> None:
    parts = [few(seed) for seed in range(3)] + [sparse({"a": ([7], [v])}) for v in (1e30, 1.0, -1e30)]
    sums = [compose(order) for order in itertools.permutations(parts)]
    for other in sums[1:]:
        for name, (index, value) in sums[0].entries.items():
            assert index.tobytes() == other.entries[name][0].tobytes()
            assert value.tobytes() == other.entries[name][1].tobytes()


def test_a_sum_is_the_sum_of_the_dense_differences() -> None:
    parts = [few(1), few(2, names="b"), few(3, names="bc")]
    total = compose(parts)
    assert set(total.entries) == {"a", "b", "c"}
    zero = np.zeros(1000, np.float32)
    for name in "abc":
        dense = [p.added(name, zero).astype(np.float64) for p in parts if name in p.entries]
        np.testing.assert_allclose(total.added(name, zero), sum(dense), rtol=1e-6)
        assert (np.diff(total.entries[name][0]) > 0).all()


def test_one_after_the_other_is_the_sum_up_to_rounding() -> None:
    parent = {"a": np.ones(1000, np.float32), "b": np.ones(1000, np.float32)}
    one, two = few(1), few(2)
    apart = two.apply(one.apply(parent, "parent"), "parent")
    together = compose([one, two]).apply(parent, "parent")
    for name in parent:
        np.testing.assert_allclose(apart[name], together[name], rtol=1e-6)


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(DataError, match="another model"):
        few(0).apply({}, "other parent")
    with pytest.raises(DataError, match="no tensor a"):
        few(0).apply({"b": np.zeros(1000, np.float32)}, "parent")
    with pytest.raises(DataError, match="outside"):
        few(0).apply({"a": np.zeros(10, np.float32), "b": np.zeros(10, np.float32)}, "parent")
    for parts in ([], [few(0), sparse({}, parent="other")]):
        with pytest.raises(DataError, match="one model"):
            compose(parts)


WRONG = {
    "falling": ({"a.index": np.array([2, 1], np.int32), "a.value": np.ones(2, np.float32)}, "do not fit"),
    "twice": ({"a.index": np.array([1, 1], np.int32), "a.value": np.ones(2, np.float32)}, "do not fit"),
    "short": ({"a.index": np.array([1], np.int32), "a.value": np.ones(2, np.float32)}, "do not fit"),
    "float": ({"a.index": np.array([0, 5], np.float32), "a.value": np.ones(2, np.float32)}, "do not fit"),
    "matrix": ({"a.value": np.ones((2, 2), np.float32)}, "do not fit"),
    "nan": ({"a.value": np.array([1, np.nan], np.float32)}, "finite"),
    "whole": ({"a.value": np.ones(3, np.int32)}, "finite"),
    "lonely": ({"a.index": np.array([1, 2], np.int32), "b.value": np.ones(2, np.float32)}, "no sparse difference"),
    "weights": ({"a.weight": np.ones(3, np.float32)}, "no sparse difference"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused(tmp_path: Path, name: str) -> None:
    content, says = WRONG[name]
    path = write_safetensors(tmp_path / "delta.safetensors", content, {"parent": "p"})
    with pytest.raises(DataError, match=says) as caught:
        Sparse.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_without_parent_or_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "no_parent", {"a.value": np.ones(3, np.float32)})
    with pytest.raises(DataError, match="no sparse difference"):
        Sparse.load(path)
    whole = few(0).save(tmp_path / "cut")
    whole.write_bytes(whole.read_bytes()[:-3])
    with pytest.raises(ModelError, match="truncated"):
        Sparse.load(whole)


def test_what_is_written_is_counted(tmp_path: Path) -> None:
    def one() -> None:
        raise AssertionError("weights are not computed for the difference")

    adapter = {"lora.json": {"r": 1}, "lora.safetensors": {"A": np.ones((2, 3), np.float32)}}
    delta = Delta(weights={"a": one, "b": one}, sparse=frozenset("a"), files={"note.json": {"x": 1}})
    assert delta.dense == {"b"}, "the change of b is in no file"
    assert Delta(weights={"a": one}, files=adapter).dense == frozenset()
    assert delta.write(tmp_path / "one", few(0)) == sum(f.stat().st_size for f in (tmp_path / "one").iterdir())
    assert {f.name for f in (tmp_path / "one").iterdir()} == {"delta.safetensors", "note.json"}
    Delta(weights={"a": one}, files=adapter).write(tmp_path / "two", None)
    assert {f.name for f in (tmp_path / "two").iterdir()} == set(adapter)
