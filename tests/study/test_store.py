"""Records stay, settings are checked, one process writes, damage is told in a sentence."""

import multiprocessing
import sqlite3
from pathlib import Path

import pytest
from made_up import trial

from fivefold.errors import Busy, StoreError, UserError
from fivefold.study.store import Store


def test_trials_come_back_as_they_were(tmp_path: Path) -> None:
    second = trial(1, 'gguf(type="q8_0")', latency=0.5).but(sentence="é", artifact="k")
    trials = [trial(0, "parent", latency=1.0), second]
    with Store(tmp_path).writing() as store:
        for t in trials:
            store.put(t)
    assert [t.to_json() for t in Store(tmp_path).trials()] == [t.to_json() for t in trials]


def test_a_trial_is_replaced_by_its_number(tmp_path: Path) -> None:
    with Store(tmp_path).writing() as store:
        store.put(trial(0, "parent", latency=1.0))
        store.put(trial(0, "parent", latency=2.0))
    assert [t.value("latency") for t in Store(tmp_path).trials()] == [2.0]


def test_commits_wait_for_the_disk_and_use_the_log(tmp_path: Path) -> None:
    with Store(tmp_path).writing() as store:
        assert store._writer is not None
        assert store._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert store._writer.execute("PRAGMA synchronous").fetchone() == (2,)


def test_the_same_settings_resume_and_others_are_named(tmp_path: Path) -> None:
    with Store(tmp_path).writing() as store:
        store.settle({"budget": "size<=1x", "seed": "0"})
    with Store(tmp_path).writing() as store:
        store.settle({"budget": "size<=1x", "seed": "0"})
        with pytest.raises(UserError, match=r"seed '0'.*says '1'.*another folder"):
            store.settle({"budget": "size<=1x", "seed": "1"})


def _hold(folder: Path, ready: object, done: object) -> None:
    with Store(folder).writing():
        ready.set()  # type: ignore[attr-defined]
        done.wait(30)  # type: ignore[attr-defined]


def test_a_second_process_is_told_busy_and_readers_are_not(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(30)
    try:
        with pytest.raises(Busy, match="another process"), Store(tmp_path).writing():
            pass
        assert Store(tmp_path).trials() == []
    finally:
        done.set()
        other.join()
    with Store(tmp_path).writing():
        pass


@pytest.mark.parametrize("content", [b"not a database at all" * 300, b"SQLite format 3\0" + bytes(4000)])
def test_a_damaged_file_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.sqlite").write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        Store(tmp_path).trials()


def test_a_record_that_does_not_read_is_a_sentence(tmp_path: Path) -> None:
    with Store(tmp_path).writing() as store:
        store.put(trial(0, "parent", latency=1.0))
    with sqlite3.connect(tmp_path / "study.sqlite") as raw:
        raw.execute("UPDATE trial SET record = '{\"number\": 0}'")
    with pytest.raises(StoreError, match="does not read"):
        Store(tmp_path).trials()


def test_no_study_reads_as_empty(tmp_path: Path) -> None:
    assert Store(tmp_path / "none").trials() == [] and Store(tmp_path / "none").meta() == {}
    assert not (tmp_path / "none").exists()
