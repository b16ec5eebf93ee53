"""Distillation by words alone: the parent writes, and the smaller model learns what it wrote.

    prompt --teacher, in its engine--> answer;    loss = mean of -log q(answer token), as in any fine-tuning

Sequence-level distillation needs nothing of the teacher but its text: no probabilities, no hidden states, so the
teacher may be one that only answers. Greedy answers are the mode of what it would say, an easier thing to learn than
the text of the world; each token tells one word where `distill` tells the whole distribution, so it takes many more.

Prompts are pieces of the calibration text, or those of the examples in the train plan. With `learn="all"` the prompt's
words are learned too, which is worth most where the prompts are real text. Greedy answers are written many at a time;
drawn ones (`temperature` above 0) one after the other, which takes several times as long. Writing may use half of
`minutes`.

Trained as in `distill`, without a teacher in memory. It does not help where the parent can be asked for its
probabilities: then `distill` reaches more in the same time. Small teachers repeat themselves in long greedy answers, so
answers are short.

Sources: Kim & Rush, Sequence-Level Knowledge Distillation, arXiv 1606.07947.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fivefold.errors import DataError, Misfit
from fivefold.model import Model, TrainPlan
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search
from fivefold.techniques._shared.distilling import NEEDS, check_student, planned, teacher_of

if TYPE_CHECKING:
    from fivefold.engines import Session
    from fivefold.tokenizer import Tokenizer
    from fivefold.training.data import Example, Examples

TOGETHER = 32
HELD_OUT = 16
SHARE = 0.5
"""Of the time allowed, the part that may go into writing."""


@dataclass(frozen=True, kw_only=True)
class DistillText(Technique):
    needs = NEEDS
    lowers = {"memory": "indirect", "compute": "indirect"}
    perturbation = 6.0

    steps: Annotated[int, Range(1, 1_000_000, log=True), Search(60, 240)] = 240
    """Training steps, at most."""
    minutes: Annotated[float, Range(0.0, 100_000.0), Fixed()] = 0.0
    """Time for writing and training; 0 is no limit. Fewer texts and steps are made where it does not reach for all."""
    tokens: Annotated[int, Range(64, 1_048_576, log=True), Fixed()] = 1024
    """Tokens per step."""
    rate: Annotated[float, Range(1e-7, 1e-1, log=True), Fixed()] = 5e-4
    """Peak learning rate."""
    prompts: Annotated[Literal["calibration", "examples"], Fixed()] = "calibration"
    """Where prompts are taken from: the calibration text, or the examples of the train plan."""
    prompt: Annotated[int, Range(1, 65_536, log=True), Fixed()] = 64
    """Tokens of a prompt taken from the calibration text."""
    answer: Annotated[int, Range(1, 65_536, log=True), Fixed()] = 64
    """Tokens of an answer, at most."""
    texts: Annotated[int, Range(32, 10_000_000, log=True), Fixed()] = 1024
    """Answers the teacher writes, at most."""
    temperature: Annotated[float, Range(0.0, 10.0), Fixed()] = 0.0
    """0 takes the likeliest word each time; above, words are drawn."""
    learn: Annotated[Literal["answer", "all"], Fixed()] = "answer"
    """What is learned of a text: what the teacher wrote, or the prompt's words too."""
    rank: Annotated[int, Range(0, 512), Fixed()] = 0
    """0 trains all weights; above, a low-rank adapter of this rank, merged at the end (needs a higher rate)."""

    def check(self, model: Model) -> None:
        check_student(self.name, model)
        if self.prompts == "examples" and model.train.data is None:
            raise Misfit(f"{self.name} was to take its prompts from examples and the plan has none; give --data, or"
                         ' prompts="calibration"')
        longest = min(model.blueprint.context, model.parent.run.context)
        if self.prompt + self.answer > longest:
            raise Misfit(f"{self.name} asks for texts of {self.prompt + self.answer} tokens and {longest} fit; choose a"
                         " shorter prompt or answer")

    def effort(self, model: Model) -> float:
        learned = 6.0 * model.blueprint.parameters * self.tokens * self.steps
        return learned + 2.0 * teacher_of(model).parameters * self.texts * (self.prompt + self.answer)

    def effort_once(self, model: Model) -> float:
        return 0.0

    def _plan(self, model: Model, spent: float = 0.0) -> TrainPlan:
        """What is left of the time after `spent` minutes of writing."""
        left = max(1e-3, self.minutes - spent) if self.minutes else 0.0
        return planned(model, steps=self.steps, minutes=left, tokens=self.tokens, rate=self.rate, rank=self.rank,
                       sequence=self.prompt + self.answer)

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.distilling import part, taught, told

        self.check(model)
        started = time.monotonic()
        rows = list(self._written(model))
        apart = len(rows) // HELD_OUT
        if not apart:
            raise DataError(f"{self.name} has {len(rows)} answers to learn from and needs {HELD_OUT}; give more prompts"
                            " or more minutes")
        held = {apart // 2 + apart * k for k in range(HELD_OUT)}
        parts = tuple(part([r for i, r in enumerate(rows) if (i in held) is inside]) for inside in (False, True))
        spent = time.monotonic() - started
        plan = self._plan(model, spent / 60)
        student, done = taught(model, self.name, plan, (parts[0], parts[1]))
        written = sum(int(row.learn.sum()) for row in rows)
        return student.covered(
            f"distill_text: {len(rows)} texts with {written} tokens to learn written in {spent:.0f} s;"
            f" {told(done, plan, 'loss')}"
        )

    def _written(self, model: Model) -> Iterator[Example]:
        """Texts of prompt and answer, until there are enough or the time for writing is over."""
        from fivefold.engines import open_session
        from fivefold.tokenizer import Tokenizer
        from fivefold.training.module import computing_dtype

        parent, tokenizer = model.parent, Tokenizer(model.tokenizer_file)
        prompts = self._prompts(model, tokenizer)
        end = time.monotonic() + 60 * SHARE * self.minutes if self.minutes else float("inf")
        dtype: Any = str(computing_dtype(model.train.dtype)).removeprefix("torch.")
        session = open_session(parent.but(run=replace(parent.run, batch=1, dtype=dtype)))
        try:
            for first in range(0, len(prompts), TOGETHER):
                if time.monotonic() > end:
                    break
                group = prompts[first : first + TOGETHER]
                for asked, said in zip(group, self._answers(session, group, first, tokenizer), strict=True):
                    yield from self._example(tokenizer, asked, said, model.blueprint.context)
        finally:
            session.close()

    def _prompts(self, model: Model, tokenizer: Tokenizer) -> list[list[int]]:
        if self.prompts == "calibration":
            from fivefold.techniques._shared.calibration import up_to

            return [[int(t) for t in row] for row in up_to(model, self.texts, self.prompt)]
        from fivefold.training import data

        assert model.train.data is not None
        found: Examples = data.read(model.train.data, tokenizer, model.blueprint.context - self.answer,
                                    template=model.train.template, limit=self.texts)
        return [[int(t) for t in row.tokens[: int(row.learn.argmax())]] for row in found.rows]

    def _answers(
        self, session: Session, prompts: Sequence[list[int]], first: int, tokenizer: Tokenizer
    ) -> list[list[int]]:
        """Each cut after the first token that ends it."""
        from fivefold.engines import Sampling

        if not self.temperature:
            said = session.generate_batch(prompts, self.answer)
        else:
            drawn = [Sampling(temperature=self.temperature, seed=first + i) for i in range(len(prompts))]
            said = [list(session.generate(p, self.answer, how)) for p, how in zip(prompts, drawn, strict=True)]
        ends = [next((i + 1 for i, t in enumerate(ids) if t in tokenizer.stop), len(ids)) for ids in said]
        return [ids[:end] for ids, end in zip(said, ends, strict=True)]

    def _example(
        self, tokenizer: Tokenizer, asked: list[int], said: list[int], longest: int
    ) -> Iterator[Example]:
        """The text of both as the student reads it; nothing where the teacher said nothing."""
        from fivefold.techniques._shared.distilling import example

        before, ended = tokenizer.decode(asked), said[-1:] if said and said[-1] in tokenizer.stop else []
        spoken = tokenizer.decode(said)
        whole = [*tokenizer.encode(before + spoken), *ended][:longest]
        shared = _shared(tokenizer.encode(before), whole)
        if spoken and 0 < shared < len(whole):
            yield example(whole, 1 if self.learn == "all" else shared)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
