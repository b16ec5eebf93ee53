"""Distillation with the teacher's probabilities: a smaller model learns to say what its parent says, word for word.

    loss = mean over positions of D(teacher || student),   both over the whole vocabulary

After layers or channels were cut out, what remains is a good start of a smaller model and a bad model. The parent knows
what each position should have been: a whole distribution instead of one right token, so a few hundred thousand tokens
carry far. D is one of four divergences (`training.divergence`):

    forward_kl   covers all the teacher may say: best agreement and calibration when the student is strong enough
    reverse_kl   seeks the teacher's mode: for answers that are drawn, from students too small to cover
    skew_kl      forward KL against a mixture with a share `mix` of the teacher: bounded gradients (DistiLLM)
    jsd          the generalised Jensen-Shannon divergence (GKD)

`on_policy` is the share of steps on texts that the student itself goes on with (GKD's lambda; with reverse_kl,
on-policy distillation), `teacher_mix` how much of the teacher is in what is drawn there (MiniLLM). `features` also asks
each layer for the teacher's hidden state.

All weights are trained, in the memory of `full` plus the teacher's weights; logits are made and dropped a chunk at a
time. A step of n tokens costs (6 x student + 2 x teacher) x n operations. What a cut saves remains; this buys back
quality, once. It does not help where the student is too small for the text, and it learns the calibration text's kind
of text only. `repair` does the same with fewer numbers for small damage and through the rounding of a file.

Sources: Hinton et al., arXiv 1503.02531; MiniLLM, arXiv 2306.08543; GKD, arXiv 2306.13649; DistiLLM, arXiv 2402.03898.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from fivefold.errors import Misfit, RecipeError
from fivefold.model import Model, TrainPlan
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search
from fivefold.techniques._shared.distilling import NEEDS, check_student, planned, teacher_of

if TYPE_CHECKING:
    from fivefold.training.method import Lesson
    from fivefold.training.run import Teaching


@dataclass(frozen=True, kw_only=True)
class Distill(Technique):
    needs = NEEDS
    lowers = {"memory": "indirect", "compute": "indirect"}
    headline = "DistiLLM: 1.6x the time of naive distillation, where others take 3-7x"
    perturbation = 6.5

    objective: Annotated[Literal["forward_kl", "reverse_kl", "skew_kl", "jsd"], Search("forward_kl", "skew_kl")] = (
        "forward_kl"
    )
    """The divergence of the student from the teacher that is made small."""
    steps: Annotated[int, Range(1, 1_000_000, log=True), Search(60, 240)] = 240
    """Training steps, at most."""
    minutes: Annotated[float, Range(0.0, 100_000.0), Fixed()] = 0.0
    """Time for the training; 0 is no limit. Fewer steps are planned where it does not reach for all."""
    tokens: Annotated[int, Range(64, 1_048_576, log=True), Fixed()] = 1024
    """Tokens per step, in sequences of 256."""
    rate: Annotated[float, Range(1e-7, 1e-1, log=True), Fixed()] = 5e-4
    """Peak learning rate."""
    temperature: Annotated[float, Range(0.1, 100.0, log=True), Fixed()] = 1.0
    """Both models' logits are divided by it; above 1, unlikely words count more."""
    mix: Annotated[float, Range(0.001, 0.999), Fixed()] = 0.1
    """Share of the teacher in the mixture of skew_kl (its alpha) and jsd (its beta)."""
    features: Annotated[float, Range(0.0, 1000.0), Fixed()] = 0.0
    """Weight of the hidden states' distance; 0 leaves them free."""
    on_policy: Annotated[float, Range(0.0, 1.0), Fixed()] = 0.0
    """Share of steps on texts the student goes on with itself."""
    teacher_mix: Annotated[float, Range(0.0, 0.99), Fixed()] = 0.0
    """Share of the teacher's probabilities in what is drawn there."""
    rank: Annotated[int, Range(0, 512), Fixed()] = 0
    """0 trains all weights; above, a low-rank adapter of this rank, merged at the end (needs a higher rate)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_mix and not self.on_policy:
            raise RecipeError("distill: teacher_mix says how texts are drawn and none are; set on_policy above 0")

    def check(self, model: Model) -> None:
        check_student(self.name, model)
        width = teacher_of(model).width
        if self.features and width != model.blueprint.width:
            raise Misfit(f"{self} compares hidden states, and the student's have {model.blueprint.width} numbers and"
                         f" the teacher's {width}; leave features=0.0")

    def effort(self, model: Model) -> float:
        work = 6.0 * model.blueprint.parameters + 2.0 * teacher_of(model).parameters
        return work * self.tokens * self.steps

    def effort_once(self, model: Model) -> float:
        return 0.0

    def _plan(self, model: Model) -> TrainPlan:
        return planned(model, steps=self.steps, minutes=self.minutes, tokens=self.tokens, rate=self.rate,
                       rank=self.rank)

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.distilling import taught, texts, told

        self.check(model)
        plan = self._plan(model)
        found: list[str] = []

        def teaching(lesson: Lesson) -> Teaching:
            return self._teaching(model, lesson, found)

        student, done = taught(model, self.name, plan, texts(model, plan), teaching)
        more = "".join(f", {sentence}" for sentence in found)
        return student.covered(f"distill: {told(done, plan, 'KL')}{more}")

    def _teaching(self, model: Model, lesson: Lesson, found: list[str]) -> Teaching:
        from fivefold.training.distill import Pupil
        from fivefold.training.divergence import Divergence
        from fivefold.training.module import load_module

        pupil = Pupil(
            student=lesson.module, teacher=load_module(model.parent, lesson.module.dtype), features=self.features,
            divergence=Divergence(kind=self.objective, temperature=self.temperature, mix=self.mix),
            on_policy=self.on_policy, mix=self.teacher_mix, seed=lesson.plan.seed,
        )
        if self.features:
            found.append(f"hidden states of layers {', '.join(map(str, pupil.places))} of the teacher, places by"
                         f" {'equal weights' if pupil.by_weights else 'depth'}")
        return pupil
