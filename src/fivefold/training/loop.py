"""The training loop, the only one: schedule, accumulation, the best held-out state, checkpoints, exact resume.

    rate(step) = base * min(1, (step + 1) / warm-up steps) * (1 + cos(pi * step / steps)) / 2

A step is a list of batches with their shares; the gradient is that of the shares' weighted mean. Two orders of work:

    whole    all batches backward, gradients clipped together to norm 1, then every parameter is updated
    fused    one batch; a parameter is updated as soon as its gradient is complete, in the middle of the backward
             pass, and the gradient is dropped: the memory of all gradients becomes that of the largest. The norm of
             all of them is known only afterwards, so the clipping uses the norm of the step before (or a tensor's
             own, where that is larger); the first step is passed through once more beforehand, to know it.

The held-out score is taken before the first step, at a few points and after the last; the parameters end as they were
at its lowest, so fitting cannot leave the model worse on that text than it was. With `patience`, that many checks in a
row without a better score end the run. A loss or score that is not finite raises NotFinite: nothing half-trained is
handed on, and the last checkpoint stays.

A technique may train in phases: each begins with a fresh optimiser and its own schedule, and only scores of the last
one, and the one before all steps, count.

A checkpoint holds all that decides the next step: weights, what lies beside them, optimiser state, random streams, the
step. Batches are a function of the step, so a resumed run repeats an uninterrupted one bit for bit (same threads, same
machine).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fivefold.errors import NotFinite, StoreError
from fivefold.model import TrainPlan
from fivefold.training.adamw import AdamW
from fivefold.training.checkpoint import Keeper
from fivefold.training.module import give_back
from fivefold.training.optimizer import Optimizer, pieces
from fivefold.training.precision import Dice, Held, State, carry, read, write
from fivefold.training.shelf import Shelf

Tokens = NDArray[np.int64]
Micro = Sequence[tuple[Any, float]]
LARGEST_NORM = 1.0
NORMED = 1 << 20
"""Numbers of a gradient whose norm is taken at once."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share a learning rate, `rate` times the plan's."""

    parameters: Mapping[str, torch.nn.Parameter]
    rate: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a listener hears after each step: the mean loss of its batches, and the clock."""

    step: int
    steps: int
    loss: float
    norm: float
    rate: float
    seconds: float
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a technique adds to the loop; every part may be missing. Steps count from 1."""

    penalty: Callable[[int], torch.Tensor | None] = lambda step: None
    gradients: Callable[[int], None] = lambda step: None
    stepped: Callable[[int], None] = lambda step: None
    buffers: Callable[[], Mapping[str, torch.Tensor]] = dict
    phases: Sequence[int] = ()
    """After how many steps training begins anew: optimiser state, step count and schedule."""
    anew: Callable[[Callable[[str], torch.Tensor]], Iterable[str]] = lambda value: ()
    """Called there with `Fitted.value`; the parameters it names return to the value they began the run with."""
    listen: Callable[[Step], None] = lambda step: None
    enough: Callable[[], str] = lambda: ""
    """Asked before each step of the last phase: why the run is to end there, "" when it goes on."""
    shelf: Shelf = field(default_factory=Shelf)
    """Where optimiser states, and what lies beside weights, are kept."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Held-out score before and at the best point, that point's step, and all that was done."""

    before: float
    after: float
    best_step: int
    steps: int
    seconds: float
    history: tuple[tuple[int, float], ...]
    losses: tuple[float, ...]
    state_bytes: int
    value: Callable[[str], torch.Tensor]
    """The float32 value of a trained parameter."""
    stopped: str = ""


def rate_at(step: int, plan: TrainPlan, steps: int = 0) -> float:
    """The share of the base learning rate at 0-based `step` of `steps` (default: the plan's)."""
    steps = steps or plan.steps
    warm = max(1, round(plan.warmup * steps))
    return min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * step / steps)) / 2


def windows(tokens: Tokens, rows: int, seed: int, at_once: int) -> Callable[[int], Micro]:
    """Steps of `rows` of the given windows (windows, length), `at_once` together: each window once per round."""
    order = np.concatenate([np.random.default_rng([seed, r]).permutation(len(tokens)) for r in range(2)])

    def step(number: int) -> Micro:
        nonlocal order
        while len(order) < (number + 1) * rows:
            more = np.random.default_rng([seed, len(order) // len(tokens)]).permutation(len(tokens))
            order = np.concatenate([order, more])
        chosen = tokens[order[number * rows : (number + 1) * rows]]
        return [(chosen[i : i + at_once], len(chosen[i : i + at_once]) / rows) for i in range(0, rows, at_once)]

    return step


def fit(
    plan: TrainPlan, groups: Sequence[Group], loss: Callable[[Any], torch.Tensor], stream: Callable[[int], Micro],
    score: Callable[[], float], *, optimizer: Optimizer | None = None, held: Held = "float32", fused: bool = False,
    checks: int = 4, patience: int = 0, hooks: Hooks = Hooks(), keeper: Keeper | None = None,
    exact: Callable[[str], torch.Tensor] | None = None,
) -> Fitted:
    """Minimise `loss(batch)` (a mean) over `stream(step)` and end at the lowest `score()`; see the module.

    `exact` gives the float32 value a parameter in bfloat16 begins at. `plan.seconds` > 0 ends the run after that time.
    """
    run = _Run(plan, groups, loss, optimizer or AdamW(), held, fused, hooks, keeper or Keeper(), exact)
    try:
        return _through(run, stream, score, checks, patience)
    finally:
        run.release()


def _through(
    run: _Run, stream: Callable[[int], Micro], score: Callable[[], float], checks: int, patience: int
) -> Fitted:
    plan, number = run.plan, run.resume()
    first = number
    if number == 0:
        run.begin()
        run.judge(0, score())
    due = {math.ceil(plan.steps * (k + 1) / checks) for k in range(checks)}
    stopped = ""
    while number < plan.steps and not (stopped := run.enough(number, patience)):
        value, found = run.step(number, stream(number)), None
        if number == first:
            give_back()
        rate = plan.learning_rate * run.share()
        number += 1
        if number in due and run.last_phase(number):
            found = score()
            run.judge(number, found)
        run.hooks.listen(Step(step=number, steps=plan.steps, loss=value, norm=run.norm, seconds=run.seconds, rate=rate,
                              score=found))
        run.save(number, last=number == plan.steps)
    if run.history[-1][0] < number:
        run.judge(number, score())
    return run.finish(stopped)


def norm_of(gradient: torch.Tensor) -> float:
    """In float32, a part at a time: a copy of the whole would be as large as two gradients in bfloat16."""
    return math.hypot(*(float(torch.linalg.vector_norm(part, dtype=torch.float32))
                        for part in gradient.reshape(-1).split(NORMED)))


def _diverged(what: str, reached: float, step: int) -> NotFinite:
    return NotFinite(f"the {what} became {reached} at step {step}; lower the learning rate and run again")


@dataclass(eq=False)
class _Run:
    plan: TrainPlan
    groups: Sequence[Group]
    loss: Callable[[Any], torch.Tensor]
    optimizer: Optimizer
    held: Held
    fused: bool
    hooks: Hooks
    keeper: Keeper
    exact: Callable[[str], torch.Tensor] | None = None
    norm: float = 0.0
    before: float = math.nan
    history: list[tuple[int, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    states: dict[str, State] = field(default_factory=dict)
    _squares: float = 0.0
    _probing: bool = False

    def __post_init__(self) -> None:
        named = [(name, p, group.rate) for group in self.groups for name, p in group.parameters.items()]
        self.parameters = {name: p for name, p, _ in named}
        self.rates = {name: rate for name, _, rate in named}
        self.beside = {name: self._placed(carry(p.data, self._held(p))) for name, p in self.parameters.items()}
        self.dice = Dice(self.plan.seed) if self.held == "stochastic" else None
        self.started, self.spent, self.number = time.monotonic(), 0.0, 0
        self.watches = [p.register_post_accumulate_grad_hook(lambda _, name=name: self._at_once(name))
                        for name, p in self.parameters.items() if self.fused]

    def release(self) -> None:
        """A later backward pass through the parameters updates nothing."""
        for watch in self.watches:
            watch.remove()

    def _placed(self, state: State) -> State:
        return {key: self.hooks.shelf.place(tensor) for key, tensor in state.items()}

    def _held(self, parameter: torch.Tensor) -> Held:
        return "float32" if parameter.dtype == torch.float32 else self.held

    def begin(self) -> None:
        for name, p in self.parameters.items():
            if self.exact is not None and p.dtype != torch.float32:
                self._put_back(name)

    @torch.no_grad()
    def _put_back(self, name: str) -> None:
        """The value the parameter began the run with."""
        assert self.exact is not None, f"it is not known what {name} began with"
        with self.hooks.shelf.lend(self.beside[name]) as state:
            for weight, value, _, near in pieces(self.parameters[name].data, self.exact(name), (), state):
                write(weight, value.clone(), near, None)

    def phase(self, number: int) -> tuple[int, int]:
        """The 0-based steps from and before which the phase of step `number` runs."""
        begun = max((at for at in self.hooks.phases if at <= number), default=0)
        return begun, min((at for at in self.hooks.phases if at > number), default=self.plan.steps)

    def last_phase(self, done: int) -> bool:
        """Whether the last of `done` steps is one of the last phase."""
        return done > 0 and self.phase(done - 1)[1] == self.plan.steps

    def enough(self, done: int, patience: int) -> str:
        """Why the run ends after `done` steps, before the last; "" when it goes on."""
        if not self.last_phase(done):
            return ""
        if reason := self.hooks.enough():
            return reason
        if patience and self.checks_without_gain >= patience:
            return f"no better held-out score in {patience} checks"
        return f"the time of {self.plan.seconds:.0f} s is used up" if 0 < self.plan.seconds < self.seconds else ""

    def share(self) -> float:
        """Of the base learning rate, at this step of its phase."""
        begun, end = self.phase(self.number)
        return rate_at(self.number - begun, self.plan, end - begun)

    @property
    def count(self) -> int:
        """Steps of the phase, this one included."""
        return self.number + 1 - self.phase(self.number)[0]

    @contextmanager
    def _flat(self, name: str) -> Iterator[State]:
        with self.hooks.shelf.lend(self.beside[name]) as near:
            yield {key: tensor.view(-1) for key, tensor in near.items()}

    def value(self, name: str) -> torch.Tensor:
        data = self.parameters[name].data
        with self._flat(name) as near:
            return read(data.view(-1), near).view(data.shape)

    @property
    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.started

    def step(self, number: int, micro: Micro) -> float:
        self.number = number
        if number in self.hooks.phases:
            self.states.clear()
            for name in self.hooks.anew(self.value):
                self._put_back(name)
        self.optimizer.begin(self.count, self.parameters, self.states)
        if self.optimizer.needs_gradients:
            if self.fused and not self.norm:
                self._probe(micro)
            value = self._backward(micro)
            if not self.fused:
                self.hooks.gradients(number + 1)
                self._update_all()
            elif self._squares:
                self._measured(math.sqrt(self._squares))
        else:
            value = self._without_gradients(micro)
        self.hooks.stepped(number + 1)
        self.losses.append(value)
        return value

    def _measured(self, norm: float) -> None:
        """The norm of a step's gradients; nothing is saved after one that is not finite."""
        if not math.isfinite(norm):
            raise _diverged("gradient", norm, self.number + 1)
        self.norm = norm

    def _backward(self, micro: Micro) -> float:
        assert not self.fused or len(micro) == 1, "an update in the backward pass needs the step in one batch"
        total, self._squares = 0.0, 0.0
        for i, (batch, share) in enumerate(micro):
            value = self.loss(batch)
            reached = float(value.detach())
            if not math.isfinite(reached):
                raise _diverged("training loss", reached, self.number + 1)
            penalty = self.hooks.penalty(self.number + 1) if i == 0 else None
            weighted = value * share if share != 1 else value
            (weighted if penalty is None else weighted + penalty).backward()
            total += reached * share
        return total

    def _probe(self, micro: Micro) -> None:
        """The norm of the step's gradients; nothing is updated."""
        self._probing = True
        try:
            with torch.random.fork_rng():
                self._backward(micro)
        finally:
            self._probing = False
        self._measured(math.sqrt(self._squares))

    def _rate(self, name: str) -> float:
        return self.plan.learning_rate * self.rates[name] * self.share()

    def _at_once(self, name: str) -> None:
        """The fused update; clipped by the norm of the step before."""
        parameter = self.parameters[name]
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        own = norm_of(gradient)
        self._squares += own**2
        if self._probing:
            return
        if max(self.norm, own) > LARGEST_NORM:
            gradient.mul_(LARGEST_NORM / max(self.norm, own))
        self._update(name, gradient)

    def _update_all(self) -> None:
        present = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        self._measured(math.hypot(*map(norm_of, present.values())))
        for name, gradient in present.items():
            if self.norm > LARGEST_NORM:
                gradient.mul_(LARGEST_NORM / self.norm)
            self._update(name, gradient)
            self.parameters[name].grad = None

    @torch.no_grad()
    def _update(self, name: str, gradient: torch.Tensor) -> None:
        weight = self.parameters[name].data
        if name not in self.states:
            self.states[name] = self._placed(self.optimizer.state(weight))
        lend = self.hooks.shelf.lend
        with lend(self.states[name]) as state, lend(self.beside[name]) as near:
            self.optimizer.update(weight, gradient, state, near, self._rate(name), self.count, self.dice)

    @torch.no_grad()
    def _without_gradients(self, micro: Micro) -> float:
        def loss() -> float:
            value = sum(float(self.loss(batch)) * share for batch, share in micro)
            if not math.isfinite(value):
                raise _diverged("training loss", value, self.number + 1)
            return value

        rates = {name: self._rate(name) for name in self.parameters}
        return self.optimizer.without_gradients(loss, self.parameters, self.beside, rates, self.count)

    def judge(self, step: int, score: float) -> None:
        if not math.isfinite(score):
            raise NotFinite(f"the held-out score became {score} at step {step}; lower the learning rate")
        if not self.history:
            self.before = score
        if score < min((s for _, s in self.history), default=math.inf):
            self.keeper.keep_best(self._stored(self._trained()), step, score)
        self.history.append((step, score))

    @property
    def checks_without_gain(self) -> int:
        scores = [s for _, s in self.history]
        return len(scores) - 1 - scores.index(min(scores))

    def _trained(self) -> dict[str, torch.Tensor]:
        """Every tensor that makes up the trained values, by a flat name."""
        out = {f"weight/{n}": p.data for n, p in self.parameters.items()}
        return out | {f"beside/{n}/{k}": t for n, near in self.beside.items() for k, t in near.items()} | {
            f"buffer/{n}": t for n, t in self.hooks.buffers().items()
        }

    def _stored(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """For a file; best states in memory are copies of the tensors themselves."""
        return {n: self.hooks.shelf.stored(t) if self.keeper.lasting else t for n, t in tensors.items()}

    def _all(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._trained().items()
        for name, state in self.states.items():
            yield from ((f"state/{name}/{key}", tensor) for key, tensor in state.items())
        if self.dice is not None:
            yield "dice", self.dice.state
        yield "random", torch.get_rng_state()
        yield "losses", torch.tensor(self.losses, dtype=torch.float64)

    def save(self, step: int, *, last: bool) -> None:
        if self.keeper.due(self.seconds) or (last and self.keeper.lasting):
            meta = {"step": step, "steps": self.plan.steps, "history": self.history, "norm": self.norm,
                    "seconds": self.seconds, "states": {n: list(s) for n, s in self.states.items()}}
            self.keeper.save(self._stored(dict(self._all())), meta, self.seconds)

    @torch.no_grad()
    def resume(self) -> int:
        found = self.keeper.load()
        if found is None:
            return 0
        tensors, meta = found
        if meta["steps"] != self.plan.steps:
            raise StoreError(f"the run in {self.keeper.folder} was begun with {meta['steps']} steps, not"
                             f" {self.plan.steps}; give another --out, or repeat the command that began it")
        for name, tensor in self._trained().items():
            tensor.copy_(tensors[name])
        for name, keys in meta["states"].items():
            self.states[name] = self._placed({key: tensors[f"state/{name}/{key}"].clone() for key in keys})
        if self.dice is not None:
            self.dice.state.copy_(tensors["dice"])
        torch.set_rng_state(tensors["random"].clone())
        self.history = [(int(step), float(score)) for step, score in meta["history"]]
        self.losses, self.norm = tensors["losses"].tolist(), float(meta["norm"])
        self.before, self.spent = self.history[0][1], float(meta["seconds"])
        return int(meta["step"])

    @torch.no_grad()
    def finish(self, stopped: str) -> Fitted:
        state_bytes = sum(t.nbytes for state in self.states.values() for t in state.values())
        self.states = {}
        best = min(self.history, key=lambda pair: pair[1])
        if best != self.history[-1]:
            kept, best = self.keeper.best()
            for name, tensor in self._trained().items():
                tensor.copy_(kept[name])
        return Fitted(
            before=self.before, after=best[1], best_step=best[0], steps=len(self.losses), seconds=self.seconds,
            history=tuple(self.history), losses=tuple(self.losses), stopped=stopped, value=self.value,
            state_bytes=state_bytes,
        )
