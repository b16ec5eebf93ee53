"""Store: the records of one study in one SQLite file, `<out>/study.sqlite`.

Two tables: `meta` (the settings a study was started with, and what the driver must not lose) and `trial` (one row of
JSON per trial). The journal is a write-ahead log and each commit waits for the disk (`synchronous=FULL`), so a trial
that was reported stays, whatever kills the process: a power cut loses at most the trial that was running.

One process writes: it holds an operating-system lock (`flock`) on `study.lock`, which ends with the process however
that ends and so is never left behind. Readers take no lock. Nothing about the search is kept that cannot be derived
from these rows.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fivefold.errors import Busy, StoreError, UserError
from fivefold.study.trial import Trial

FILE = "study.sqlite"
SCHEMA = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS trial (number INTEGER PRIMARY KEY, record TEXT NOT NULL);
"""


class Store:
    """`Store(folder)` reads; inside `with store.writing():` it may also write. Raises StoreError on a damaged file."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.file = self.folder / FILE
        self._writer: sqlite3.Connection | None = None

    @contextmanager
    def writing(self) -> Iterator[Store]:
        """Hold the one writer's lock. Raises Busy when another process has it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "study.lock").open("a")
        except OSError as error:
            raise StoreError(
                f"{self.folder} cannot be written ({error.strerror}); choose another folder for the study"
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(
                    f"another process is working on the study in {self.folder}; wait for it, or stop it first"
                ) from None
            with self._told():
                self._writer = sqlite3.connect(self.file, isolation_level=None)
                self._writer.execute("PRAGMA journal_mode=WAL")
                self._writer.execute("PRAGMA synchronous=FULL")
                self._writer.executescript(_TABLES)
            try:
                yield self
            finally:
                self._writer.close()
                self._writer = None

    def exists(self) -> bool:
        return self.file.is_file()

    def meta(self) -> dict[str, Any]:
        """Everything kept beside the trials; empty for a study that has not started."""
        return {key: json.loads(value) for key, value in self._read("SELECT key, value FROM meta ORDER BY key")}

    def trials(self) -> list[Trial]:
        """Every trial, by number."""
        return [self._trial(record) for (record,) in self._read("SELECT record FROM trial ORDER BY number")]

    def put(self, *trials: Trial) -> None:
        """Insert the trials, or replace those of the same numbers: all or none. On the disk when this returns."""
        rows = [(t.number, _dumps(t.to_json())) for t in trials]
        places = ", ".join(["(?, ?)"] * len(rows))
        self._write(f"INSERT OR REPLACE INTO trial VALUES {places}", tuple(v for row in rows for v in row))

    def set_meta(self, key: str, value: Any) -> None:
        self._write("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, _dumps(value)))

    def settle(self, settings: Mapping[str, str]) -> None:
        """Keep the settings of a new study, or check that this is the same study.

        Raises UserError naming the setting that differs and what to do.
        """
        known = self.meta()
        if "settings" not in known:
            self.set_meta("schema", SCHEMA)
            self.set_meta("settings", dict(settings))
            return
        if known.get("schema") != SCHEMA:
            raise StoreError(
                f"the study in {self.folder} was written by another version of fivefold; use another folder"
            )
        for key in sorted({*known["settings"], *settings}):
            old, new = known["settings"].get(key), settings.get(key)
            if old != new:
                raise UserError(
                    f"the study in {self.folder} was started with {key} {old!r}, and this command says {new!r};"
                    " repeat the first, or give another folder"
                )

    def _trial(self, record: str) -> Trial:
        try:
            return Trial.from_json(json.loads(record))
        except (ValueError, KeyError, TypeError):
            raise self._damaged("a trial's record does not read") from None

    def _read(self, query: str) -> list[Any]:
        if not self.exists():
            return []
        with self._told():
            if self._writer is not None:
                return self._writer.execute(query).fetchall()
            reader = sqlite3.connect(self.file.resolve().as_uri() + self._how(), uri=True, isolation_level=None)
            try:
                tables = {name for (name,) in reader.execute("SELECT name FROM sqlite_master")}
                return reader.execute(query).fetchall() if {"meta", "trial"} <= tables else []
            finally:
                reader.close()

    def _how(self) -> str:
        """Reading beside a writer needs the log's index, which is a file; a read-only folder has no writer."""
        if os.access(self.folder, os.W_OK):
            return "?mode=rw"
        log = self.file.with_name(FILE + "-wal")
        if log.is_file() and log.stat().st_size:
            raise StoreError(
                f"{self.folder} is read-only and its study was killed while writing; copy it to a folder of your own"
            )
        return "?mode=ro&immutable=1"

    def _write(self, query: str, values: tuple[Any, ...]) -> None:
        assert self._writer is not None, "a study is written inside `with store.writing():`"
        with self._told():
            self._writer.execute(query, values)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise Busy(f"another process holds {self.file}; try again when it is done") from None
            if any(said in str(error) for said in ("full", "readonly", "unable to open", "disk I/O")):
                raise StoreError(
                    f"{self.file} cannot be written ({error}); free disk space or check its rights"
                ) from None
            raise self._damaged(str(error)) from None
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, why: str) -> StoreError:
        return StoreError(f"{self.file} is damaged ({why}); restore it from a copy, or start again in another folder")


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
