"""Events: what a running study tells whoever watches. Plain values; drawing them is the watcher's business."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fivefold.study.trial import Trial


@dataclass(frozen=True, slots=True)
class Prepared:
    """Before anything is spent: the machine, the plan (`plan.Plan`), and the allowance in seconds."""

    machine: Any
    plan: Any
    objectives: tuple[str, ...]
    allowance: float | None


@dataclass(frozen=True, slots=True)
class Started:
    """`resumed` trials were on record already."""

    folder: str
    resumed: int


@dataclass(frozen=True, slots=True)
class TrialStarted:
    """`rung` is "build" (and screen) or "measure" (and quality) or "in turn"; `expected` is in seconds."""

    number: int
    recipe: str
    rung: str
    expected: float


@dataclass(frozen=True, slots=True)
class PhaseStarted:
    number: int
    phase: str


@dataclass(frozen=True, slots=True)
class TrialFinished:
    trial: Trial


@dataclass(frozen=True, slots=True)
class Paired:
    """These trials were measured in turn with the parent, or the sentence why not is in their `paired`."""

    trials: tuple[Trial, ...]


@dataclass(frozen=True, slots=True)
class FrontChanged:
    front: tuple[Trial, ...]


@dataclass(frozen=True, slots=True)
class Spent:
    """What the study has spent so far: seconds, joules, USD, bytes on disk; None where it is not known."""

    time: float
    energy: float | None
    money: float | None
    disk: float


@dataclass(frozen=True, slots=True)
class Ended:
    """`why` the study ended, as a sentence."""

    why: str


Event = Prepared | Started | TrialStarted | PhaseStarted | TrialFinished | Paired | FrontChanged | Spent | Ended
Watcher = Callable[[Event], None]
