"""Worker: one phase of one trial in a process of its own. `python -m fivefold.study.worker job.json`

    reference   open the parent, record its answers on the small and the large sample
    build       apply the recipe, write the artifact, open it, fidelity on the small sample (the screen)
    measure     open the artifact, measure it under the workload, then quality (`quality`) on the large sample
    in turn     measure the parent and some artifacts in rounds that visit each (`in_turn`), in processes of their own

A measuring process never built anything, so its memory is that of a server. Modules are imported as late as possible:
measuring a GGUF file loads no torch. The result is one JSON file, written atomically; a process that leaves none has
crashed. `progress` in the job's folder holds the phase that runs now.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fivefold.errors import FivefoldError, NotFinite, TrialFailure, UserError
from fivefold.files import write_text
from fivefold.machine import Machine
from fivefold.model import Model, model_from_json
from fivefold.quantity import Measurement, Quantity
from fivefold.recipe import Recipe


class Work:
    """One job, its clock by phase, and where it reports."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = job
        self.spent: dict[str, float] = {}
        self.model = model_from_json(job["model"])
        self.machine = Machine.from_json(job["machine"])
        self.folder = Path(job["folder"])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        write_text(Path(self.job["progress"]), name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - start

    def run(self) -> dict[str, Any]:
        jobs = {"reference": self.reference, "build": self.build, "measure": self.measure, "in turn": self.in_turn}
        return jobs[self.job["do"]]()

    def reference(self) -> dict[str, Any]:
        from fivefold.engines import open_session
        from fivefold.study import quality
        from fivefold.tasks.fidelity import Reference
        from fivefold.tokenizer import Tokenizer

        with self.phase("reference"):
            session = open_session(self.model)
            for size in ("screen", "full"):
                Reference.record(session, self.job["windows"][size]).save(self.folder / f"reference-{size}.npz")
        if (self.folder / quality.QUESTIONS).is_file():
            with self.phase("quality"):
                quality.record(self.folder, session, Tokenizer(self.model.tokenizer_file))
        session.close()
        return {}

    def build(self) -> dict[str, Any]:
        from fivefold.study.build import Builder

        builder = Builder(self.folder, self.machine, self.job["quota"], self.job["seed"])
        with self.phase("build"):
            built = builder.build(Recipe.parse(self.job["recipe"]), self.model)
        self.spent |= built.steps
        with self.phase("screen"):
            screen = self._quality(built.model, "screen")
        return {
            "screen": screen.to_json(), "made": {name: q.to_json() for name, q in built.made.items()},
            "coverage": list(built.model.coverage), "artifact": built.artifact.key if built.artifact else None,
        }

    def measure(self) -> dict[str, Any]:
        from fivefold.meters import measure
        from fivefold.meters.money import Prices

        model = self._served(self.job["recipe"], self.job["artifact"])
        with self.phase("measure"):
            measured = measure(
                model, self._traffic(model), rounds=self.job["rounds"], patience=self.job["patience"],
                machine=self.machine, prices=Prices(**self.job["prices"]), country=self.job["country"],
            )
        with self.phase("quality"):
            quality = self._quality(model, "full")
        return {"measurement": measured.merged(quality).to_json()}

    def in_turn(self) -> dict[str, Any]:
        from fivefold.meters.money import Prices
        from fivefold.study.in_turn import PHASE, failed, measured
        from fivefold.study.trial import Outcome

        found, others, job = {}, {}, self.job
        for arm in job["arms"]:
            try:
                others[arm["number"]] = self._served(arm["recipe"], arm["artifact"])
            except UserError as error:
                found[arm["number"]] = failed(Outcome.REFUSED, str(error))
        with self.phase(PHASE):
            found |= measured(
                self.model, others, lambda model: self._traffic(model, job["requests"]), rounds=job["rounds"],
                patience=job["patience"], room=job["room"],
                sizes={int(n): size or 0.0 for n, size in job["sizes"].items()},
                machine=self.machine, prices=Prices(**job["prices"]), country=job["country"],
            )
        return {"paired": {number: m.to_json() for number, m in found.items()}}

    def _served(self, recipe: str, artifact: str | None) -> Model:
        """A trial's model as it is served. Raises UserError when its artifact is gone."""
        from fivefold.artifact import Store
        from fivefold.study.build import opened, served

        model = self.model
        if artifact is not None:
            found = Store(self.folder / "artifacts").get(artifact)
            if found is None:
                raise UserError(f"the artifact {artifact[:12]} is gone from the store; run the study again")
            model = opened(found, self.model)
        return served(Recipe.parse(recipe), model)

    def _traffic(self, model: Model, count: int | None = None) -> Any:
        """The workload, or `count` of its requests; where it allows, as many decoded together as the recipe says."""
        from fivefold.meters.worker import PlainWorkload
        from fivefold.study.in_turn import spread

        workload = PlainWorkload.from_json(self.job["workload"])
        if count is not None:
            workload = replace(workload, requests=spread(workload.requests, count))
        if workload.batch > 1 and model.run.batch > 1:
            return replace(workload, batch=min(model.run.batch, len(workload.requests)))
        return workload

    def _quality(self, model: Model, size: str) -> Measurement:
        """Fidelity on the sample of that size; on the full one the study's tasks as well."""
        from fivefold.engines import open_session
        from fivefold.study.pareto import UNSCREENED
        from fivefold.study.quality import on_tasks
        from fivefold.tasks.fidelity import Reference, fidelity
        from fivefold.tokenizer import Tokenizer

        reference = Reference.load(self.folder / f"reference-{size}.npz")
        itself = not Recipe.parse(self.job["recipe"]).techniques
        session = None if itself else open_session(model)
        try:
            found = (reference.itself() if session is None else fidelity(session, reference)).measurement
            if size == "screen":
                found = Measurement({n: q for n, q in found.items() if n not in UNSCREENED}, found.context)
            else:
                found = found.merged(on_tasks(self.folder, session, Tokenizer(self.model.tokenizer_file)))
        finally:
            if session is not None:
                session.close()
        return finite(found)


def finite(measurement: Measurement) -> Measurement:
    """The same measurement. Raises NotFinite naming the metric that is NaN or infinite."""
    for name, quantity in measurement.items():
        if quantity.value is not None and not math.isfinite(quantity.value):
            raise NotFinite(f"{name} came out as {quantity.value}")
    return measurement


def main(file: str) -> int:
    job = json.loads(Path(file).read_text(encoding="utf-8"))
    from fivefold.meters.ledger import metered

    work = Work(job)
    result: dict[str, Any] = {}
    with metered(machine=work.machine) as window:
        try:
            result = work.run()
        except (UserError, TrialFailure) as error:
            result = {"error": str(error), "kind": type(error).__name__}
        except FivefoldError as error:
            result = {"error": str(error), "kind": "Crashed"}
        except MemoryError:
            result = {"error": "an allocation was refused by the system", "kind": "OutOfMemory"}
    for name, cost in (("energy.J", window.cost.energy), ("money.USD", window.cost.money)):
        if isinstance(cost, Quantity) and cost.value is not None:
            work.spent[name] = cost.value
    result["spent"] = work.spent
    write_text(Path(job["result"]), json.dumps(result))
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the result is on the disk; tearing down torch takes seconds and changes nothing
