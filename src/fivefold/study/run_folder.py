"""The folder of a training run: what was asked and chosen, a line per step, and what all its processes took so far.

    run.json        the request, the way that was chosen with its plan and forecast, what earlier processes took
    log.jsonl       a line per step: loss, held-out score, tokens/s, and what the whole run took so far
    exam.json       what parent and artifact are asked
    checkpoint.*    while it runs, see `training.checkpoint`;  work/    what is removed at its end
    model/          the artifact, once it is done

A run goes on with the plan it was begun with: a forecast made again may come out differently. Only its memory may be
limited anew. Steps that were lost are logged again, and what they took stays counted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fivefold.errors import Busy, StoreError
from fivefold.files import if_free, storage, write_text
from fivefold.meters.ledger import Cost
from fivefold.model import TrainPlan, plan_to_json
from fivefold.quantity import Quantity
from fivefold.recipe import Recipe
from fivefold.study.forecast import Forecast
from fivefold.study.judged import Exam
from fivefold.study.request import Request
from fivefold.training.checkpoint import BEST, STATE
from fivefold.training.memory import Needs

RUN, LOG, EXAM, MODEL, WORK = "run.json", "log.jsonl", "exam.json", "model", "work"
KEPT = {"seconds": "seconds", "energy": "joules", "money": "usd", "memory": "memory"}
"""What is logged of a cost: its name there -> its name in the log."""


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder, made if need be. Raises Busy, and StoreError when it holds something else or is finished."""
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{self.path} is a file; give a folder as --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be made ({error.strerror}); give another --out") from None
        with if_free(self.path / ".lock") as free:
            if not free:
                raise Busy(f"another process trains in {self.path}; wait for it or give another --out")
            if (self.path / MODEL).exists() and (self.path / RUN).is_file():
                self.clear()
                raise StoreError(f"the run in {self.path} is finished, its model is {self.path / MODEL}; give another"
                                 " --out to train again")
            if not (self.path / RUN).is_file() and any(not f.name.startswith(".") for f in self.path.iterdir()):
                raise StoreError(f"{self.path} is not empty and holds no training run; give a new folder as --out")
            yield

    def begun(self, request: Request) -> Forecast | None:
        """The way chosen when the run was begun; None when it was not. Raises StoreError when it is another run."""
        told, asked = self._read(), request.identity
        if told is None:
            return None
        odd = sorted(k for k in {*asked, *told["request"]} if told["request"].get(k) != asked.get(k))
        if odd:
            raise StoreError(f"{self.path} holds a run with another {', '.join(odd)}; give another --out, or repeat the"
                             " command that began it")
        try:
            chosen = dict(told["chosen"])
            plan = TrainPlan(**chosen.pop("plan"), data=request.data.expanduser().resolve())
            needs = Needs(**chosen.pop("needs"))
            return Forecast(recipe=Recipe.parse(chosen.pop("recipe")), plan=plan, needs=needs, **chosen)
        except (KeyError, TypeError, ValueError):
            raise self._damaged() from None

    def begin(self, request: Request, chosen: Forecast, exam: Exam, taken: Cost) -> None:
        """Write the run down; `taken` by earlier processes."""
        plan = {k: v for k, v in plan_to_json(chosen.plan).items() if k != "data"}
        assert chosen.needs is not None
        way = {"recipe": str(chosen.recipe), "plan": plan, "needs": asdict(chosen.needs), "seconds": chosen.seconds,
               "joules": chosen.joules, "usd": chosen.usd, "trained": chosen.trained, "per_step": chosen.per_step,
               "judging": chosen.judging}
        told = {"request": request.identity, "chosen": way, "taken": logged(taken)}
        write_text(self.path / EXAM, json.dumps(exam.to_json()) + "\n")
        write_text(self.path / RUN, json.dumps(told, indent=1) + "\n")

    def taken(self, like: Cost) -> Cost | None:
        """What earlier processes took, as far as it was logged, obtained as `like` was; None when there were none."""
        told = self._read()
        if told is None:
            return None
        found = max([told["taken"], *self.lines()[-1:]], key=lambda line: float(line["seconds"]))
        return Cost.of({name: _as(like.quantities()[name], found[field]) for name, field in KEPT.items()})

    def lines(self) -> list[dict[str, Any]]:
        """The log, without a line that a killed process was writing."""
        file, found = self.path / LOG, []
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return [line for line in found if isinstance(line, dict) and {"step", *KEPT.values()} <= set(line)]

    def cut(self, step: int) -> None:
        """Leave the lines of the first `step` steps: the others are done again."""
        kept = [line for line in self.lines() if line["step"] <= step]
        write_text(self.path / LOG, "".join(json.dumps(line) + "\n" for line in kept))

    def work(self) -> Path:
        """An empty folder for what the run makes on its way."""
        shutil.rmtree(self.path / WORK, ignore_errors=True)
        with storage(self.path):
            (self.path / WORK).mkdir(parents=True)
        return self.path / WORK

    def clear(self) -> None:
        """Remove what a finished run no longer needs."""
        shutil.rmtree(self.path / WORK, ignore_errors=True)
        for left in (STATE, BEST):
            (self.path / left).unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        if not (self.path / RUN).is_file():
            return None
        try:
            told = json.loads((self.path / RUN).read_text(encoding="utf-8"))
            if not isinstance(told["request"], dict) or not set(KEPT.values()) <= set(told["taken"]):
                raise ValueError
            dict(told["chosen"])
        except (OSError, ValueError, KeyError, TypeError):
            raise self._damaged() from None
        return dict(told)

    def _damaged(self) -> StoreError:
        return StoreError(f"{self.path / RUN} is damaged or of another version; give another --out")


def logged(cost: Cost) -> dict[str, float | None]:
    """What a line of the log says of it."""
    return {field: cost.quantities()[name].value for name, field in KEPT.items()}


def _as(like: Quantity, value: float | None) -> Quantity:
    """`value` with the method of a quantity and an interval of the same relative width."""
    if value is None or like.value is None:
        return Quantity.missing(like.unit, like.reason or "not recorded by an earlier process", like.method)
    ends = {end: value * getattr(like, end) / like.value for end in ("low", "high")
            if like.value and getattr(like, end) is not None}
    return Quantity(value=value, unit=like.unit, method=like.method, reason=like.reason, **ends)


def exam_of(folder: Path) -> Exam:
    """What the run in `folder` was judged by. Raises StoreError."""
    try:
        return Exam.from_json(json.loads((folder / EXAM).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(f"{folder / EXAM} is missing or damaged, so the model cannot be judged again; train again"
                         ) from None
