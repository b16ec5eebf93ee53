"""Artifacts: immutable folders that say what they are, kept in a store addressed by their content.

An artifact holds the exported weights, `recipe.txt`, and `manifest.json`: the SHA-256 of every file, the model's
description (format, blueprint, traits, plans, coverage), the cost to make it, and the facts its maker gives (parent,
versions, hashes of data). A shipped copy also carries its measurements, `card.json`, and `README.md`.

The store's *key* is the SHA-256 of everything that decides the result: code, parameters, parent, data, versions, seed.
Whatever changes makes another key, so a stale artifact is never found. An artifact is built beside its place and
renamed into it, under a lock per key: two processes that want the same one build it once, and a killed one leaves
nothing that could be found. When the quota is full, those cheapest to make again per byte they occupy (seconds /
bytes) go first; what is pinned or in use stays.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from fivefold.errors import StoreError
from fivefold.files import atomic_folder, if_free, locked, remove_partial, sha256, storage, write_text
from fivefold.model import Model, model_from_json, model_to_json
from fivefold.paths import cache_dir
from fivefold.weights import check_safetensors, gguf_header

FORMAT = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 << 20


def key(parts: Mapping[str, Any]) -> str:
    """Full SHA-256 of `parts` as canonical JSON (sorted keys, no spaces, no NaN)."""
    import hashlib

    text = json.dumps(dict(parts), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def source_hash(thing: object) -> str:
    """SHA-256 of the source file in which a class or function is written: its code version."""
    return sha256(Path(inspect.getfile(thing)))  # type: ignore[arg-type]


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, for a key or a manifest; a package that is not there is "absent"."""
    import importlib.metadata

    out = {}
    for package in packages:
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "absent"
    return out


def hash_folder(path: Path) -> str:
    """SHA-256 of a model: of the file, or of names and contents of all files of the folder.

    The hash of each file is remembered in the cache folder with its size and time of change.
    """
    if path.is_file():
        return _hash_file(path)
    import hashlib

    lines = [f"{f.relative_to(path)} {_hash_file(f)}\n" for f in _files(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    import hashlib

    path = path.resolve()
    state = path.stat()
    note = cache_dir() / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()}.txt"
    stamp = f"{state.st_size} {state.st_mtime_ns} "
    if note.is_file() and (text := note.read_text(encoding="ascii", errors="replace")).startswith(stamp):
        return text.removeprefix(stamp)
    digest = sha256(path)
    write_text(note, stamp + digest)
    return digest


def _files(folder: Path) -> list[Path]:
    """Regular files in name order; hidden ones do not belong to a model."""
    found = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a builder made in its folder: a model whose `path` lies there, by which recipe, at what cost.

    `facts` is JSON: parent, versions, data hashes, the one-off ledger, engine. `card` is JSON: measurements.
    """

    model: Model
    recipe: str
    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Artifact:
    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the manifest and check that every file is there in its size.

        Raises StoreError, naming the file, when the folder is no artifact or was changed.
        """
        file = path / MANIFEST
        try:
            if file.stat().st_size > MAX_MANIFEST_BYTES:
                raise ValueError("too large")
            manifest = json.loads(file.read_text(encoding="utf-8"))
            entries = {str(n): (int(e["bytes"]), str(e["sha256"])) for n, e in manifest["files"].items()}
            if manifest["format"] != FORMAT:
                raise StoreError(f"{path} is an artifact of another version of Fivefold; make it again")
            if not {"key", "recipe", "seconds", "model"} <= set(manifest):
                raise ValueError("incomplete")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise StoreError(f"{path} has no readable {MANIFEST}, so it is no artifact; make it again") from None
        for name, (size, _) in entries.items():
            part = path / name
            if not _inside(path, name) or not part.is_file() or part.stat().st_size != size:
                raise StoreError(f"{part} is missing or was changed after the artifact was made; make it again")
        return cls(path=path, manifest=manifest)

    def verify(self) -> None:
        """Read every byte; StoreError names the first file that was changed, removed or added by hand."""
        entries = self.manifest["files"]
        for file in _files(self.path):
            name = str(file.relative_to(self.path))
            if name != MANIFEST and name not in entries:
                raise StoreError(f"{file} was added after the artifact was made; remove it")
        for name, entry in entries.items():
            file = self.path / name
            if not file.is_file() or sha256(file) != entry["sha256"]:
                raise StoreError(f"{file} was changed after the artifact was made; make it again or copy it again")

    @property
    def key(self) -> str:
        return str(self.manifest["key"])

    @property
    def recipe(self) -> str:
        return str(self.manifest["recipe"])

    @property
    def facts(self) -> Mapping[str, Any]:
        return dict(self.manifest.get("facts", {}))

    @property
    def card(self) -> Mapping[str, Any] | None:
        """The measurements of a shipped copy; None in the store."""
        file = self.path / "card.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    @property
    def bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())

    def model(self) -> Model:
        """The model in this folder, its weight headers checked. Raises ModelError or StoreError."""
        name = str(self.manifest["model"]["path"])
        if not _inside(self.path, name):
            raise StoreError(f"{self.path / MANIFEST} points outside the artifact; do not use it")
        model = _moved(model_from_json(self.manifest["model"]), self.path, name)
        if model.decode.draft is not None:
            gguf_header(model.decode.draft)
        if model.format == "gguf":
            gguf_header(model.path)
        else:
            for file in sorted(model.path.glob("*.safetensors")):
                check_safetensors(file)
        return model

    def write_copy(
        self, to: Path, *, card: Mapping[str, Any] | None = None, readme: str | None = None,
        model: Model | None = None, recipe: str | None = None,
    ) -> Artifact:
        """A complete copy in the new folder `to`, with its card, without paths of this machine.

        `model` and `recipe` replace the artifact's own where run-time choices were added to them.

        Raises StoreError when this artifact was changed, or `to` exists or cannot be written.
        """
        import shutil

        self.verify()
        with atomic_folder(to) as work:
            for name in self.manifest["files"]:
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.path / name, work / name)
            copied = _moved(replace(model or self.model(), origin=None), work, self.manifest["model"]["path"])
            made = Made(
                model=copied, recipe=recipe or self.recipe, seconds=float(self.manifest["seconds"]), facts=self.facts,
                card=card if card is not None else self.card,
            )
            seal(work, made, self.key, readme)
        return Artifact.open(to)


def _moved(model: Model, folder: Path, name: str) -> Model:
    """The same model with its files, the drafting one's too, in `folder`."""
    draft = model.decode.draft and folder / model.decode.draft.name
    return replace(model, path=folder / name, decode=replace(model.decode, draft=draft))


def _inside(folder: Path, name: str) -> bool:
    return (folder / name).resolve().is_relative_to(folder.resolve())


def seal(folder: Path, made: Made, key: str, readme: str | None = None) -> None:
    """Write recipe, card, README and manifest into a finished folder."""
    inside, draft = made.model.path.relative_to(folder), made.model.decode.draft
    plan = replace(made.model.export, importance=None, solved=None)
    decode = replace(made.model.decode, draft=draft and draft.relative_to(folder))
    model = made.model.but(path=inside, decode=decode, export=plan, work=None, calibration=None)
    write_text(folder / "recipe.txt", made.recipe + "\n")
    if made.card is not None:
        write_text(folder / "card.json", _json(made.card))
    write_text(folder / "README.md", readme or readme_text(made))
    files = {
        str(f.relative_to(folder)): {"bytes": f.stat().st_size, "sha256": sha256(f)}
        for f in _files(folder) if f.name != MANIFEST
    }
    manifest = {
        "format": FORMAT, "key": key, "recipe": made.recipe, "seconds": made.seconds, "facts": dict(made.facts),
        "model": model_to_json(model), "files": files,
    }
    write_text(folder / MANIFEST, _json(manifest))


def readme_text(made: Made) -> str:
    """A short model card: the recipe, what it reached, and the measurements if there are any."""
    lines = [f"# {made.model.name}", "", f"Made by Fivefold with `{made.recipe}`.", ""]
    lines += [f"- {sentence}" for sentence in made.model.coverage]
    quantities = (made.card or {}).get("quantities", {})
    if quantities:
        lines += ["", "| metric | value | unit | how | n | 95 % interval |", "|---|---|---|---|---|---|"]
    for name, q in quantities.items():
        known = q.get("value") is not None
        interval = f"{q['low']:.4g} to {q['high']:.4g}" if known and q.get("low") is not None else ""
        value = f"{q['value']:.4g}" if known else f"not obtained: {q.get('reason', '')}"
        lines.append(f"| {name} | {value} | {q.get('unit')} | {q.get('method')} | {q.get('n', 1)} | {interval} |")
    return "\n".join(lines) + "\n"


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Store:
    """Artifacts under `root`, at most `quota_bytes` together (None: no limit)."""

    root: Path
    quota_bytes: int | None = None

    def get(self, key: str) -> Artifact | None:
        """The artifact of this key, or None. Raises StoreError when it was changed by hand."""
        folder = self.root / key
        if not folder.is_dir():
            return None
        artifact = Artifact.open(folder)
        if artifact.key != key:
            raise StoreError(f"{folder} holds the artifact of another key; remove that folder")
        return artifact

    def put(self, key: str, build: Callable[[Path], Made]) -> Artifact:
        """The artifact of this key, built by `build(empty folder)` if it is not there yet.

        Whatever `build` raises passes through and leaves nothing. Raises StoreError when the quota or the disk is full.
        """
        with locked(self._lock(key)):
            found = self.get(key)
            if found is not None:
                return found
            remove_partial(self.root / key)
            with ExitStack() as until_placed, atomic_folder(self.root / key) as work:
                seal(work, build(work), key)
                until_placed.enter_context(locked(self.root / ".locks" / "room"))
                self._make_room(Artifact.open(work).bytes)
        return Artifact.open(self.root / key)

    @contextmanager
    def using(self, key: str) -> Iterator[Artifact]:
        """Hold an artifact while working with it: no process evicts it. Raises StoreError when it is not there."""
        with locked(self._use(key), shared=True):
            artifact = self.get(key)
            if artifact is None:
                raise StoreError(f"the store has no artifact {key[:12]}; make it again")
            yield artifact

    def pin(self, key: str) -> None:
        """Never evict this artifact, until `unpin`."""
        write_text(self.root / ".pins" / key, "")

    def unpin(self, key: str) -> None:
        (self.root / ".pins" / key).unlink(missing_ok=True)

    def artifacts(self) -> list[Artifact]:
        """All readable artifacts, least worth keeping (seconds to make per byte) first."""
        found = []
        for folder in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            if folder.is_dir() and not folder.name.startswith("."):
                try:
                    found.append(Artifact.open(folder))
                except StoreError:
                    continue
        return sorted(found, key=lambda a: (float(a.manifest["seconds"]) / max(1, a.bytes), a.key))

    def _make_room(self, needed: int) -> None:
        if self.quota_bytes is None:
            return
        held = self.artifacts()
        excess = sum(a.bytes for a in held) + needed - self.quota_bytes
        with ExitStack() as locks:
            loose = [a for a in held if not (self.root / ".pins" / a.key).exists()]
            free = [a for a in loose if locks.enter_context(if_free(self._use(a.key)))]
            if excess > sum(a.bytes for a in free):
                raise StoreError(
                    f"the store at {self.root} may hold {self.quota_bytes} bytes and this artifact needs {needed}"
                    " beside those pinned or in use; raise the quota"
                )
            for artifact in free:
                if excess <= 0:
                    break
                self._evict(artifact)
                excess -= artifact.bytes

    def _evict(self, artifact: Artifact) -> None:
        """Renamed first, so that no reader finds a half-removed folder."""
        import shutil

        with storage(artifact.path):
            gone = artifact.path.rename(self.root / f".{artifact.path.name}.evicted")
        shutil.rmtree(gone, ignore_errors=True)

    def _lock(self, key: str) -> Path:
        return self.root / ".locks" / f"{key}.lock"

    def _use(self, key: str) -> Path:
        return self.root / ".locks" / f"{key}.use"
