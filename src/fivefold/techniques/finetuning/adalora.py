"""AdaLoRA: low-rank changes whose ranks move, during training, to the layers where they matter.

    W' = W + (alpha / r) P diag(e) Q        e starts at zero, P and Q near orthogonal by a penalty

Every layer begins with `start` x `rank` triplets (column of P, number of e, row of Q). A triplet's importance is that
of its numbers, |w g| smoothed over steps, times how much that wavers, smoothed too. From 10 % of the steps on, the e of
the least important triplets of all layers together are set to zero, more and more of them (cubic), until after 60 % an
average of `rank` per layer is left; these then train on. The result is the best state on held-out text, with the
ranks it had.

Against LoRA of the same final size it gains where layers need different ranks, by its authors' account most at small
budgets. It costs `start` times the adapter's memory and three times that for importances, needs the gradient of every
number in every step, and a few hundred steps for the schedule to mean something. Afterwards W' is one matrix again.

Made, scheduled and saved by `peft` (its RankAllocator); the passes are our own (`_shared.lean_adapters`).

Source: Zhang et al., arXiv 2303.10512.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from fivefold.errors import Misfit
from fivefold.model import Blueprint, TrainPlan
from fivefold.space import Fixed, Range, Search
from fivefold.training.method import Adaptation, Lesson, Shapes, linear_shapes

if TYPE_CHECKING:
    import torch

    from fivefold.training.delta import Delta

FIRST, LAST = 0.1, 0.4
"""Shares of the steps before ranks begin to fall, and after they have fallen."""
LEAST = 2
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


@dataclass(frozen=True, kw_only=True)
class Adalora(Adaptation):
    blocks = False
    libraries = ("peft",)
    perturbation = 2.0

    rank: Annotated[int, Range(1, 512, log=True), Search(4, 16, 64)] = 16
    """Triplets per layer at the end, on average."""
    start: Annotated[float, Range(1.0, 4.0), Fixed()] = 1.5
    """Triplets per layer at the beginning, as a multiple of `rank` (one more at least)."""
    alpha: Annotated[float, Range(0.1, 1024, log=True), Fixed()] = 32.0
    """Scale of the change: it is multiplied by alpha / (triplets at the beginning)."""
    orthogonality: Annotated[float, Range(0.0, 10.0), Fixed()] = 0.1
    """Weight of the penalty |P'P - I| + |Q Q' - I|, averaged over layers."""
    every: Annotated[int, Range(1, 1000, log=True), Fixed()] = 1
    """Steps between two cuts."""
    rate: Annotated[float, Range(1e-7, 1e-1, log=True), Fixed()] = 1e-3
    """Peak learning rate."""

    def edited(self, plan: TrainPlan) -> TrainPlan:
        return replace(plan, learning_rate=self.rate)

    @property
    def first_rank(self) -> int:
        return max(self.rank + 1, round(self.start * self.rank))

    def shapes(self, blueprint: Blueprint) -> Shapes:
        found: dict[str, tuple[int, ...]] = {}
        for name, (outputs, inputs) in linear_shapes(blueprint).items():
            found |= {f"{name}.P": (outputs, self.first_rank), f"{name}.e": (self.first_rank, 1),
                      f"{name}.Q": (self.first_rank, inputs)}
        return found

    def weight_bytes(self, blueprint: Blueprint, element: int) -> float:
        shapes = self.shapes(blueprint)
        importances = 12 * sum(map(math.prod, shapes.values()))
        products = 4 * sum(math.prod(shape) for name, shape in shapes.items() if name.endswith(".Q"))
        marks = self.first_rank * len(linear_shapes(blueprint))
        return super().weight_bytes(blueprint, element) + importances + products + marks

    def kept(self, blueprint: Blueprint) -> float:
        return float(self.first_rank * len(linear_shapes(blueprint)) / blueprint.layers)

    def prepare(self, lesson: Lesson) -> dict[str, torch.nn.Parameter]:
        import torch

        from fivefold.engines._peft import peft
        from fivefold.techniques._shared import lean_adapters
        from fivefold.techniques._shared.adapters import NAME, adapted, common, opened

        config = peft().AdaLoraConfig(
            target_r=self.rank, init_r=self.first_rank, lora_alpha=self.alpha, deltaT=self.every, total_step=1,
            orth_reg_weight=self.orthogonality, **common(lesson),
        )
        tuner = peft().AdaLoraModel(lesson.module, config, NAME)
        lesson.extra["tuner"] = tuner
        for layer in adapted(lesson).values():
            layer.ranknum[NAME].requires_grad_(False).data = torch.tensor([float(self.first_rank)])
        trained = opened(lesson, config)
        lesson.extra["kept"] = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in trained.items() if "lora_E" in n}
        _present(tuner.rankallocator, trained)
        for layer in adapted(lesson).values():
            lean_adapters.use(layer, lean_adapters.adalora)
        return trained

    def ready(self, lesson: Lesson, loss: Callable[[Any], torch.Tensor], batches: Callable[[int], Any]) -> None:
        steps = lesson.plan.steps
        if steps < LEAST:
            raise Misfit(f"adalora needs {LEAST} steps to choose ranks by, and this run has {steps}; use lora")
        config = lesson.extra["config"]
        config.total_step, config.tinit = steps, round(FIRST * steps)
        config.tfinal = min(round(LAST * steps), steps - config.tinit - LEAST)

    def penalty(self, lesson: Lesson, step: int) -> torch.Tensor | None:
        import torch

        terms = []
        for name, p in lesson.trained.items() if self.orthogonality else ():
            if "lora_E" not in name:
                square = p @ p.T if "lora_A" in name else p.T @ p
                terms.append(torch.linalg.matrix_norm(square - torch.eye(len(square), device=p.device)))
        return self.orthogonality * torch.stack(terms).mean() if terms else None

    def gradients(self, lesson: Lesson, step: int) -> None:
        lesson.extra["gradients"] = {name: p.grad for name, p in lesson.trained.items()}

    def stepped(self, lesson: Lesson, step: int) -> None:
        import torch

        gradients = lesson.extra.pop("gradients", {})
        if any(gradients.get(name) is None for name in lesson.trained):
            raise Misfit("adalora needs the gradient of every number it trains in every step, which the update of this"
                         " recipe does not make; remove the update, or use lora")
        tuner, config, kept = (lesson.extra[key] for key in ("tuner", "config", "kept"))
        config.rank_pattern = {name: mask.flatten().tolist() for name, mask in kept.items()}
        for name, p in lesson.trained.items():
            p.grad = gradients[name]
        tuner.update_and_allocate(step)
        for p in lesson.trained.values():
            p.grad = None
        for name, mask in kept.items():
            mask.copy_(torch.tensor(config.rank_pattern[name]).view(mask.shape))
        _present(tuner.rankallocator, lesson.trained)

    def buffers(self, lesson: Lesson) -> Mapping[str, torch.Tensor]:
        allocator = lesson.extra["tuner"].rankallocator
        averages = {f"{kind}/{name}": t for kind in AVERAGES for name, t in getattr(allocator, kind).items()}
        return averages | {f"kept/{name}": mask for name, mask in lesson.extra["kept"].items()}

    def result(self, lesson: Lesson, value: Callable[[str], torch.Tensor]) -> Delta:
        from fivefold.techniques._shared.adapters import NAME, adapted, merged, saved

        tensors: dict[str, torch.Tensor] = {}
        pattern: dict[str, list[bool]] = {}
        lesson.extra["config"].rank_pattern = None
        for name, layer in adapted(lesson).items():
            left = (layer.lora_E[NAME] != 0).flatten()
            pattern[f"{name}.lora_E"] = left.tolist()
            named = {"A": layer.lora_A[NAME][left], "E": layer.lora_E[NAME][left], "B": layer.lora_B[NAME][:, left]}
            tensors |= {f"base_model.model.{name}.lora_{k}": t.detach().contiguous() for k, t in named.items()}
        return merged(lesson, files=saved(lesson, tensors, rank_pattern=pattern))


def _present(allocator: Any, trained: Mapping[str, torch.nn.Parameter]) -> None:
    """An entry for every number in peft's tables of importances, which it begins and drops as it goes."""
    import torch

    for table in ("ipt", *AVERAGES):
        held = getattr(allocator, table)
        for name, parameter in trained.items():
            if name not in held:
                held[name] = torch.zeros_like(parameter, requires_grad=False)
