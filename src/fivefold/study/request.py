"""What a person asks of `train`, and what it tells: what it plans, each step (`watch.Progress`), what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fivefold.artifact import Artifact, hash_folder
from fivefold.budget import TrainingBudget
from fivefold.errors import UserError
from fivefold.files import sha256
from fivefold.meters.ledger import Cost
from fivefold.model import Model, TrainPlan
from fivefold.study.forecast import Forecast
from fivefold.study.judged import Judged
from fivefold.study.watch import Progress

PARTS = ("recipe", "task", "template", "epochs", "steps", "tokens_per_step", "patience", "items", "seed")
LIMITS = {"epochs": (1e-3, 1e6), "steps": (0, 1e9), "tokens_per_step": (32, 1e7), "patience": (0, 1e9),
          "items": (2, 1e7), "seed": (0, 2**32 - 1)}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What was forecast and what was chosen; `resumed` steps are done already, and it will be `judged` on that."""

    forecasts: tuple[Forecast, ...]
    chosen: Forecast
    budget: TrainingBudget
    rows: int
    held_out: int
    tokens: int
    judged: str = ""
    resumed: int = 0


@dataclass(frozen=True, kw_only=True)
class Finished:
    """`cost` is that of training; `judged` has the parent and the artifact on the same items."""

    folder: Path
    artifact: Artifact
    recipe: str
    steps: int
    numbers: int
    delta_bytes: int
    before: float
    after: float
    cost: Cost
    predicted_peak: float
    judged: Judged
    stopped: str = ""


Listener = Callable[[Progress | Planned | str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asked for; see `verbs.train`. Raises UserError for numbers that make no sense."""

    model: Model
    data: Path
    out: Path
    budget: TrainingBudget
    recipe: str = ""
    task: str = ""
    test: Path | None = None
    template: str = TrainPlan.template
    epochs: float = 1.0
    steps: int = 0
    tokens_per_step: int = 1024
    patience: int = 0
    items: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name.replace('_', ' ')} is {getattr(self, name)}; give a number from {low:g} to"
                                f" {high:g}")

    @property
    def identity(self) -> dict[str, Any]:
        """What makes a run this run, as JSON. Its memory limit does not: a run may go on with more."""
        return {
            "model": hash_folder(self.model.path), "data": sha256(self.data.expanduser()),
            "budget": {k: v for k, v in asdict(self.budget).items() if k != "memory"},
            "test": sha256(self.test.expanduser()) if self.test else None,
            **{name: getattr(self, name) for name in PARTS},
        }
