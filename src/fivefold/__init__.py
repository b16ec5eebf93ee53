"""Fivefold makes a language model cheaper to own, and proves it.

The public names, loaded when first used; nothing is defined here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Allowance": "budget", "Artifact": "artifact", "Budget": "budget", "FivefoldError": "errors", "Machine": "machine",
    "Measurement": "quantity", "Model": "model", "Quantity": "quantity", "Recipe": "recipe", "Study": "study.study",
    "Technique": "recipe", "Trait": "model", "Trial": "study.trial", "UserError": "errors", "Workload": "workload",
    "catalogue": "verbs", "compare": "verbs", "doctor": "verbs", "explain": "verbs", "load": "model",
    "measure": "verbs", "optimize": "verbs", "pick": "verbs", "plan": "verbs", "serve": "verbs", "ship": "verbs",
    "train": "verbs",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"

if TYPE_CHECKING:
    from fivefold.artifact import Artifact as Artifact
    from fivefold.budget import Allowance as Allowance
    from fivefold.budget import Budget as Budget
    from fivefold.errors import FivefoldError as FivefoldError
    from fivefold.errors import UserError as UserError
    from fivefold.machine import Machine as Machine
    from fivefold.model import Model as Model
    from fivefold.model import Trait as Trait
    from fivefold.model import load as load
    from fivefold.quantity import Measurement as Measurement
    from fivefold.quantity import Quantity as Quantity
    from fivefold.recipe import Recipe as Recipe
    from fivefold.recipe import Technique as Technique
    from fivefold.study.study import Study as Study
    from fivefold.study.trial import Trial as Trial
    from fivefold.verbs import catalogue as catalogue
    from fivefold.verbs import compare as compare
    from fivefold.verbs import doctor as doctor
    from fivefold.verbs import explain as explain
    from fivefold.verbs import measure as measure
    from fivefold.verbs import optimize as optimize
    from fivefold.verbs import pick as pick
    from fivefold.verbs import plan as plan
    from fivefold.verbs import serve as serve
    from fivefold.verbs import ship as ship
    from fivefold.verbs import train as train
    from fivefold.workload import Workload as Workload


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fivefold' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fivefold.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
