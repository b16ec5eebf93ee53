"""Optimize: set up a study of a model with real processes, and run it. The one call behind the verb.

The settings that identify a study are the parent's content, budget, objectives, workload, text, tasks, country,
sampler, seed and the search space; the allowance is not among them, so the same command with more time goes on. A study
of another version of fivefold is not mixed with this one's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fivefold
from fivefold.artifact import hash_folder
from fivefold.budget import Allowance, Budget
from fivefold.engines._type_speed import settle
from fivefold.errors import ModelError
from fivefold.machine import Machine
from fivefold.meters.money import Prices
from fivefold.model import Model
from fivefold.study import quality
from fivefold.study.driver import WINDOW, Processes
from fivefold.study.events import Prepared, Watcher
from fivefold.study.pareto import Goal
from fivefold.study.policy import DEFAULT_TRIALS, Policy
from fivefold.study.predictor import Predictor
from fivefold.study.sampler import SearchSpace, make
from fivefold.study.study import Study
from fivefold.tasks.choice import ChoiceSet
from fivefold.tokenizer import Tokenizer
from fivefold.workload import Workload

DEFAULTS = {"workload": "chat", "text": "encyclopedia", "country": "world"}
MEASURE_SHARE, DEFAULT_TIME = 0.06, 900.0
ITEMS = 100
TURN_SHARE = 0.08
"""Of the allowance, kept for measuring the picks in turn with the parent."""
LEAST_WINDOWS = 4
"""Of any sample: an interval needs several."""
LEAST_SECONDS = 120.0
"""No phase of a trial may take longer than the whole allowance, but this much it may always take."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything a study needs, resolved: what `plan` shows and `optimize` runs."""

    model: Model
    goal: Goal
    machine: Machine
    workload: Workload
    policy: Policy
    settings: Mapping[str, str]
    windows: Callable[[str, int], list[list[int]]]
    country: str
    seed: int
    questions: tuple[ChoiceSet, ...] = ()
    question_tokens: int = 0
    """Tokens that each trial scores to answer the questions."""


def setup(
    model: Model, *, budget: Budget, objectives: tuple[str, ...], allowance: Allowance, workload: str = "chat",
    text: str = "encyclopedia", country: str = "world", sampler: str = "fivefold", seed: int = 0,
    trials: int | None = None, techniques: Mapping[str, Any] | None = None, machine: Machine | None = None,
    tasks: tuple[str, ...] = (), items: int = ITEMS,
) -> Setup:
    """Resolve names; raises UserError for what does not exist. `techniques` narrows the catalogue.

    `tasks` are labelled sets (or .jsonl files) of which every trial answers `items` each; none changes nothing.
    """
    sets = quality.questions(tasks, items)
    quality.check(Goal(objectives, budget), sets)
    if machine is None:
        machine = Machine.load()
        with contextlib.suppress(ModelError):  # widths llama.cpp cannot run: forecasts stay with the rough table
            settle(model.blueprint)
    tokenizer = Tokenizer(model.tokenizer_file)
    traffic = Workload.load(workload, tokenizer)
    space = SearchSpace.build(model, techniques, traffic.batch)
    goal = Goal(objectives, budget)
    sizes = traffic.describe()
    predictor = Predictor(machine, model, int(sizes["prompt_tokens"]), int(sizes["output_tokens"]), sizes["requests"])
    limited = any((allowance.time, allowance.energy, allowance.money))
    policy = Policy(
        goal, space, make(sampler, goal, predictor), predictor, allowance, seed,
        trials if trials is not None or limited else DEFAULT_TRIALS, TURN_SHARE,
    )
    fingerprint = hashlib.sha256(json.dumps(space.levels, sort_keys=True, default=str).encode()).hexdigest()[:16]
    settings = {
        "model": hash_folder(model.path)[:16], "budget": str(budget), "objectives": ",".join(objectives),
        "workload": sizes["digest"], "text": text, "country": country, "sampler": sampler, "seed": str(seed),
        "search space": fingerprint, "version": fivefold.__version__, "machine": machine.id[:16],
        **({"task": quality.spelled(sets)} if sets else {}),
    }
    return Setup(
        model=model, goal=goal, machine=machine, workload=traffic, policy=policy, settings=settings,
        windows=lambda split, tokens: _windows(tokenizer, text, split, tokens, model.blueprint.context),
        country=country, seed=seed, questions=sets, question_tokens=quality.tokens(sets, tokenizer),
    )


def prepared(
    model: Model, out: Path | str, *, memory: int | None = None, rounds: int = 5, seconds: float | None = None,
    **choices: Any,
) -> tuple[Setup, Processes]:
    """What `optimize` will run, and the runner of its trials in the folder `out`."""
    text = str(choices.get("text", DEFAULTS["text"]))
    if model.calibration is None and text != DEFAULTS["text"]:
        model = model.but(calibration=calibration_text(text, Path(out)))
    made = setup(model, **choices)
    disk, time = made.policy.allowance.disk, made.policy.allowance.time
    longest = seconds or (max(LEAST_SECONDS, time) if time else None)
    limits: dict[str, Any] = {} if longest is None else {"seconds": longest}
    return made, Processes(
        folder=Path(out).resolve(), model=model, machine=made.machine, workload=made.workload, windows=made.windows,
        prices=Prices.load(), country=made.country, seed=made.seed, memory=memory,
        rounds=rounds, patience=MEASURE_SHARE * (time or DEFAULT_TIME),
        quota=None if disk is None else int(disk), questions=made.questions, **limits,
    )


def optimize(model: Model, out: Path | str, *, events: Watcher | None = None, **choices: Any) -> Study:
    """Run or resume the study in `out`; `choices` are those of `setup` and `prepared`. Returns it, finished.

    `memory` caps each trial's processes (bytes), `seconds` each phase. `rounds` of the workload are measured, fewer
    (but 2) once they have taken `MEASURE_SHARE` of the allowance. Raises Busy, UserError, Infeasible never.
    """
    made, runner = prepared(model, out, **choices)
    if events is not None:
        from fivefold.study.plan import plan_of

        events(Prepared(made.machine, plan_of(made), made.goal.objectives, made.policy.allowance.time))
    inputs: dict[str, str] = {name: str(choices[name]) for name in ("workload", "text", "country") if name in choices}
    if made.questions:
        inputs["task"] = ", ".join(f"{s.name} ({len(s.items)} items)" for s in made.questions)
    facts: dict[str, Any] = {"name": model.name, "machine": made.machine.to_json(), "inputs": {**DEFAULTS, **inputs}}
    return Study(out).run(made.policy, runner, made.settings, events, facts)


def calibration_text(text: str, out: Path) -> Path:
    """The calibration split of the user's own text as a file in `out`: what is made and what is judged stay apart."""
    from fivefold.files import write_text
    from fivefold.tasks.text import documents

    return write_text(out.resolve() / "calibration.txt", "\n\n".join(documents(text, "calibration")))


def _windows(tokenizer: Tokenizer, text: str, split: str, tokens: int, context: int) -> list[list[int]]:
    from fivefold.tasks.text import windows

    size = min(WINDOW, context, tokens // LEAST_WINDOWS)
    return windows(tokenizer, text, "screen" if split == "screen" else "evaluation", tokens, size)
