"""Distillation from the parent after damage: the damaged model learns to give the parent's answers again.

The loss is KL(parent || student) over the whole vocabulary on calibration text, so no labels are needed and a few
hundred thousand tokens carry far. What is trained is what costs nothing in the file:

- after a GGUF quantization: the scales (and minima) of every block and, with `codes=True`, which of its neighbouring
  codes each weight takes, all *through* the rounding, so what is learnt survives in the file byte for byte; and norm
  gains;
- after pruning: a low-rank change of every linear layer, merged into the weights (pruned zeros stay zero), and norm
  gains.

One step of `tokens` tokens costs about 8 x parameters x tokens operations (teacher forward 2, student 6). The state
that does best on held-out windows is kept. Lowers nothing by itself: it buys back quality, so that a smaller setting of
the technique before it becomes acceptable. It costs training once (see payback), and it fits the distribution of the
calibration text. Little is gained where the damage is already near the engine's own arithmetic noise (about 0.005
nats for engines with 8-bit activations).

Sources: EfficientQAT (Chen et al., arXiv 2407.11062); LoRA (Hu et al., arXiv 2106.09685); Hinton et al., arXiv
1503.02531.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from fivefold.errors import Misfit
from fivefold.model import Model, TrainPlan, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search

SEQUENCE = 256
UNDAMAGED = frozenset({Trait.FLOAT_WEIGHTS, Trait.DENSE_WEIGHTS, Trait.FULL_DEPTH, Trait.FULL_WIDTH,
                       Trait.UNIFORM_LAYERS, Trait.EXACT_ATTENTION})


@dataclass(frozen=True, kw_only=True)
class Repair(Technique):
    needs = frozenset({Trait.UNFITTED, Trait.TRAINABLE, Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.UNFITTED})
    lowers = {"memory": "indirect", "compute": "indirect"}
    may_raise = ()
    perturbation = 8.0

    steps: Annotated[int, Range(1, 100_000, log=True), Search(30, 120)] = 120
    """Training steps."""
    tokens: Annotated[int, Range(64, 65_536, log=True), Fixed()] = 1024
    """Tokens per step, in sequences of 256."""
    rate: Annotated[float, Range(1e-6, 1e-1, log=True), Fixed()] = 3e-4
    """Peak learning rate, relative for scales."""
    codes: Annotated[bool, Fixed()] = False
    """After quantization, train the codes too: for long runs; takes memory for four more copies of the weights."""
    rank: Annotated[int, Range(1, 512, log=True), Fixed()] = 32
    """After pruning, rank of the change of each linear layer."""

    def check(self, model: Model) -> None:
        if model.traits >= UNDAMAGED:
            raise Misfit(
                f"{self.name} has nothing to repair: no technique before it damages the model; add one, such as"
                " mixed_precision or prune_depth, or remove repair"
            )

    def effort(self, model: Model) -> float:
        return 8.0 * model.blueprint.parameters * self.tokens * self.steps

    def plan(self, model: Model) -> Model:
        return model.but(train=self._train(model))

    def _train(self, model: Model) -> TrainPlan:
        return replace(model.train, steps=self.steps, learning_rate=self.rate, tokens_per_step=self.tokens,
                       sequence=min(SEQUENCE, model.blueprint.context))

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.lesson import AT_ONCE, Lesson, text
        from fivefold.training.loop import fit, windows

        plan = self._train(model)
        train, held_out = text(model, plan)
        student = self._student(model, plan.seed)
        lesson = Lesson(model, student, held_out)
        groups = student.groups()
        stream = windows(train, max(1, plan.tokens_per_step // plan.sequence), plan.seed, AT_ONCE)
        done = fit(plan, groups, lesson.loss, stream, lesson.score)
        numbers = sum(p.numel() for group in groups for p in group.parameters.values())
        return student.result().but(train=plan).covered(
            f"repair: held-out KL {done.before:.4f} -> {done.after:.4f} at step {done.best_step} of {plan.steps},"
            f" {plan.steps * plan.tokens_per_step} tokens, {numbers} numbers trained"
        )

    def _student(self, model: Model, seed: int) -> Any:
        import torch

        from fivefold.techniques._shared.students import FloatStudent, RoundedStudent
        from fivefold.training.module import load_module

        module = load_module(model, torch.float32)
        if model.export.format == "gguf":
            return RoundedStudent(model, module, codes=self.codes)
        return FloatStudent(model, module, rank=self.rank, seed=seed)
