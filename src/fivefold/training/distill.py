"""Distillation: the teacher's whole distribution at every position is what the student is asked for.

    hidden states of both -> logits of a chunk of positions -> divergence and its gradient -> logits dropped

The teacher runs beside the student, without gradients, in the dtype the machine computes fastest; nothing of it is kept
from step to step. The held-out score is the forward KL at temperature 1 whatever was trained by, so runs with
different objectives can be compared and the best state of each is the one nearest to the teacher.

With `features`, the student's layers are also asked for the teacher's hidden states: the output of layer i should be
what the layer that follows it read in the teacher,

    loss + features x mean over layers and positions of |h - h'|^2 / |h'|^2

so a layer learns to stand in for those cut out behind it. Layers find their places by equal weights, or evenly over the
depth where no weights are equal; both models need one width.

Sources: Hinton et al., arXiv 1503.02531; hidden states: Sun et al., arXiv 1908.09355 (patient distillation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fivefold.training import attention, lean
from fivefold.training.batching import Batch
from fivefold.training.cross_entropy import IGNORE
from fivefold.training.divergence import Answers, Divergence, head_divergence, logits_divergence
from fivefold.training.module import plain_head
from fivefold.training.rollout import own_turn, rollout


def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher || student), nats per token, of logits (..., vocabulary); differentiable in `student`."""
    ours, theirs = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    return logits_divergence(Divergence(), ours, lambda rows: theirs[rows].float())


@dataclass(eq=False)
class Pupil:
    """Student and teacher side by side; `run` takes `loss`, `held_loss` and `batches` from it.

    `student` is the module as prepared for training. `on_policy` is the share of steps on the student's own texts.
    """

    student: Any
    teacher: Any
    divergence: Divergence
    features: float = 0.0
    on_policy: float = 0.0
    mix: float = 0.0
    seed: int = 0
    places: list[int] = field(default_factory=list)
    """For each of the student's layers, how many layers of the teacher its output stands for."""
    by_weights: bool = False
    _seen: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        attention.use(self.teacher)
        lean.install(self.teacher)
        self.own, self.theirs = layers_of(self.student), layers_of(self.teacher)
        if self.features:
            self.places, self.by_weights = places(self.own, self.theirs)
            for layer in self.own:
                layer.register_forward_hook(lambda _, args, out: self._seen.append(_first(out)))

    def batches(self, batches: Sequence[Batch], step: int) -> list[Batch]:
        if not own_turn(step, self.on_policy):
            return list(batches)
        return [rollout(batch, self.student, (self.seed, step, i), teacher=self.teacher, mix=self.mix)
                for i, batch in enumerate(batches)]

    def loss(self, batch: Batch) -> torch.Tensor:
        return self._asked(batch, self.divergence, self.features)

    def held_loss(self, batch: Batch) -> torch.Tensor:
        return self._asked(batch, Divergence(), 0.0)

    def _asked(self, batch: Batch, divergence: Divergence, features: float) -> torch.Tensor:
        assert batch.segments is None, "texts that share a row need a mask"
        tokens = torch.from_numpy(batch.tokens).to(self.student.device)
        where = torch.from_numpy(batch.targets != IGNORE).to(tokens.device)
        wanted: list[torch.Tensor] = []
        with torch.no_grad():
            answers = self._answers(tokens, where, wanted if features else None)
        self._seen.clear()
        if plain_head(self.student):
            hidden = self.student.base_model(input_ids=tokens, use_cache=False).last_hidden_state[where]
            loss = head_divergence(divergence, hidden, self.student.get_output_embeddings().weight, answers)
        else:
            logits = self.student(input_ids=tokens, use_cache=False).logits[where]
            loss = logits_divergence(divergence, logits, answers)
        if features:
            apart = [_apart(seen[where], state) for seen, state in zip(self._seen, wanted, strict=True)]
            loss = loss + features * torch.stack(apart).mean()
        self._seen.clear()
        return loss

    def _answers(self, tokens: torch.Tensor, where: torch.Tensor, states: list[torch.Tensor] | None) -> Answers:
        """The teacher's logits where they are wanted; what stands for each of the student's layers into `states`."""
        found: dict[int, torch.Tensor] = {}
        hooks = [self.theirs[place - 1].register_forward_hook(
            lambda _, args, out, place=place: found.__setitem__(place, _first(out)[where]))
            for place in (set(self.places) if states is not None else ())]
        try:
            hidden = self.teacher.base_model(input_ids=tokens, use_cache=False).last_hidden_state[where]
        finally:
            for hook in hooks:
                hook.remove()
        if states is not None:
            states.extend(found[place] for place in self.places)
        head = self.teacher.get_output_embeddings()
        if plain_head(self.teacher):
            return lambda rows: _copy(hidden[rows] @ head.weight.T)
        logits = self.teacher(input_ids=tokens, use_cache=False).logits[where]
        return lambda rows: _copy(logits[rows])


def _copy(logits: torch.Tensor) -> torch.Tensor:
    return logits.detach().to(torch.float32, copy=True)


def _first(out: Any) -> torch.Tensor:
    state: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return state


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    wide = theirs.float()
    return ((ours.float() - wide).square().sum(-1) / wide.square().sum(-1).clamp_min(1e-12)).mean()


def layers_of(module: Any) -> Any:
    """The decoder's layers, in order."""
    depth = module.config.num_hidden_layers
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    return next(part for part in base.base_model.modules()
                if isinstance(part, torch.nn.ModuleList) and len(part) == depth)


def places(student: Sequence[Any], teacher: Sequence[Any]) -> tuple[list[int], bool]:
    """For each layer of the student how many of the teacher's it stands for, and whether equal weights told it.

    A layer stands for its own place and all before the next one that was kept.
    """
    kept: list[int] = []
    for layer in student:
        first = kept[-1] + 1 if kept else 0
        kept += [k for k in range(first, len(teacher)) if _equal(layer, teacher[k])][:1]
    if len(kept) == len(student):
        return [*kept[1:], len(teacher)], True
    return [round((i + 1) * len(teacher) / len(student)) for i in range(len(student))], False


def _equal(one: Any, other: Any) -> bool:
    a, b = _matrices(one), _matrices(other)
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a)


def _matrices(layer: Any) -> dict[str, torch.Tensor]:
    """By name; an adapter's own are left out."""
    found = {name.replace(".base_layer", ""): p for name, p in layer.named_parameters() if p.ndim == 2}
    return {name: p for name, p in found.items() if "lora_" not in name}
