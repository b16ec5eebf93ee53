"""Build: a recipe applied step by step, each prefix once, and the result written as an artifact.

Two recipes that begin alike share that beginning: after each building technique the model so far is kept in
`steps/<key>/`, its description in `model.json` (written last: a step without it was interrupted and is made again).
The key is the full SHA-256 of everything that decides the result: the parent's content, each technique with its
parameters, the source of its file and its further inputs (`Technique.inputs`: a table measured on this machine, say),
the code they share, calibration data, library versions and the seed.

Each step is metered while it is made, and keeps its cost: the cost to make an artifact is the sum over its steps and
the export, whether they were re-used or not. When the steps exceed their quota, those used longest ago go first.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fivefold.artifact import Artifact, Made, hash_folder, key, source_hash, versions
from fivefold.artifact import Store as ArtifactStore
from fivefold.files import sha256, write_text
from fivefold.machine import Machine
from fivefold.meters.ledger import Cost, metered
from fivefold.model import Model, model_from_json, model_to_json
from fivefold.quantity import Quantity
from fivefold.recipe import Recipe, Technique

_SHARED = ("techniques/_shared", "training", "export", "engines/_layers")
_LIBRARIES = ("fivefold", "torch", "transformers", "peft", "gguf", "numpy", "xllamacpp")


@dataclass(frozen=True)
class Built:
    """`model` is ready to be opened by its engine, run-time techniques applied; `steps` are seconds of what was made
    now (nothing for what was found); `artifact` is None when nothing builds and the parent itself is served."""

    model: Model
    artifact: Artifact | None
    made: Mapping[str, Quantity]
    steps: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Builder:
    """`folder` holds `steps/` and `artifacts/`; `quota` is bytes for both, None is no limit."""

    folder: Path
    machine: Machine
    quota: int | None = None
    seed: int = 0

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(self.folder / "artifacts", self.quota)

    def build(self, recipe: Recipe, parent: Model) -> Built:
        """Raises Misfit before any work; UserError and TrialFailure from the techniques pass through."""
        recipe.check(parent)
        if not recipe.build.techniques:
            return Built(served(recipe, parent), None, Cost.nothing().quantities())
        keys = self.keys(recipe, parent)
        steps: dict[str, float] = {}
        artifact = self.store.get(keys[-1])
        if artifact is None:
            model, cost = self._chain(recipe, parent, keys, steps)
            artifact = self._export(recipe, model, cost, keys[-1], steps)
            self._prune(keys)
        made = {name: Quantity.from_json(q) for name, q in artifact.facts["made"].items()}
        return Built(served(recipe, opened(artifact, parent)), artifact, made, steps)

    def keys(self, recipe: Recipe, parent: Model) -> list[str]:
        """The key after each building technique; the last one is the artifact's."""
        base: dict[str, Any] = {
            "parent": hash_folder(parent.path), "seed": self.seed, "versions": versions(*_LIBRARIES),
            "shared": shared_code(),
            "plans": {k: v for k, v in model_to_json(parent).items() if k in ("train", "export")},
            "data": sha256(parent.calibration) if parent.calibration else "bundled",
        }
        spelled, planned = [], parent
        for technique, last in recipe.build.stages():
            inputs = technique.inputs(planned)
            spelled.append((str(technique), source_hash(type(technique)), last, *([inputs] if inputs else [])))
            planned = technique.plan(planned).without(*technique.breaks)
        return [key({**base, "steps": spelled[: i + 1]}) for i in range(len(spelled))]

    def _chain(
        self, recipe: Recipe, parent: Model, keys: Sequence[str], steps: dict[str, float]
    ) -> tuple[Model, Cost]:
        model, cost = parent, Cost.nothing()
        for (technique, last), step_key in zip(recipe.build.stages(), keys, strict=True):
            folder = self.folder / "steps" / step_key
            if not (folder / "model.json").is_file():
                steps[f"step.{technique.name}"] = self._step(technique, model, folder, last)
            os.utime(folder)
            record = json.loads((folder / "model.json").read_text(encoding="utf-8"))
            model = model_from_json(record["model"])
            cost += Cost.of({name: Quantity.from_json(q) for name, q in record["cost"].items()})
        return model, cost

    def _step(self, technique: Technique, model: Model, folder: Path, last: bool) -> float:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        start = time.perf_counter()
        with metered(machine=self.machine) as window:
            done = technique.apply(model.but(work=folder)).without(*technique.breaks)
            done = technique.finish(done) if last else done
        record = {"model": model_to_json(done), "cost": _json(window.cost)}
        write_text(folder / "model.json", json.dumps(record))
        return time.perf_counter() - start

    def _export(
        self, recipe: Recipe, model: Model, cost: Cost, artifact_key: str, steps: dict[str, float]
    ) -> Artifact:
        from fivefold.export import export

        def build(folder: Path) -> Made:
            start = time.perf_counter()
            with metered(machine=self.machine) as window:
                written = export(model, folder)
            steps["step.export"] = time.perf_counter() - start
            total = cost + window.cost
            facts = {
                "made": _json(total), "parent": {"name": model.parent.name}, "seed": self.seed,
                "versions": versions(*_LIBRARIES), "machine": self.machine.id, "coverage": list(written.coverage),
            }
            return Made(
                model=written, recipe=str(recipe.build), seconds=total.seconds.value or 0.0, facts=facts
            )

        return self.store.put(artifact_key, build)

    def _prune(self, in_use: Sequence[str]) -> None:
        """Remove the steps used longest ago while they take more than half of the quota."""
        if self.quota is None:
            return
        kept = sorted((self.folder / "steps").iterdir(), key=lambda p: p.stat().st_mtime)
        sizes = {p: folder_bytes(p) for p in kept}
        total = sum(sizes.values())
        for path in kept:
            if total <= self.quota / 2:
                return
            if path.name not in in_use[:-1]:
                shutil.rmtree(path, ignore_errors=True)
                total -= sizes[path]


def opened(artifact: Artifact, parent: Model) -> Model:
    """The artifact's model, judged by `parent`."""
    return artifact.model().but(origin=parent)


def served(recipe: Recipe, model: Model) -> Model:
    """The model with the recipe's run-time techniques applied: only plans of how to run change."""
    for technique in recipe.runtime:
        model = technique.apply(model).without(*technique.breaks)
    return model


def shared_code() -> str:
    """Hash of the code that techniques share and of the exporters."""
    root = Path(str(importlib.import_module("fivefold").__file__)).parent
    files = sorted(f for part in _SHARED for f in (root / part).rglob("*.py"))
    return key({str(f.relative_to(root)): sha256(f) for f in files})


def folder_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0


def _json(cost: Cost) -> dict[str, Any]:
    return {name: q.to_json() for name, q in cost.quantities().items()}


