"""A tiny model with examples, an adapter in it, and what transformers and peft make of the same files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fivefold.engines._peft import peft
from fivefold.model import Model
from fivefold.recipe import Recipe
from fivefold.techniques._shared.adapters import adapted
from fivefold.testing import tiny_model
from fivefold.testing.tiny import tiny_examples
from fivefold.training.batching import Batch, Stream
from fivefold.training.checkpoint import Keeper
from fivefold.training.delta import Delta
from fivefold.training.method import Adaptation, Lesson, Methods
from fivefold.training.module import loss_of, write_trained
from fivefold.training.run import Trained, examples_of, prepared, run

IDS = torch.arange(3, 51).view(2, 24)


def pupil(folder: Path, family: str = "llama", *, rows: int = 64, width: int = 64, **plan: Any) -> Model:
    """Two layers; 20 steps of 256 tokens in float32 unless `plan` says otherwise."""
    model = tiny_model(folder / family, family, layers=2, width=width, vocab=257, context=256)
    settings = {"steps": 20, "tokens_per_step": 256, "dtype": "float32", **plan}
    return model.but(train=replace(model.train, data=tiny_examples(folder / f"{rows}.jsonl", rows), **settings))


def planned(model: Model, recipe: str) -> Model:
    return Recipe.parse(recipe).plan(model)


@dataclass
class Desk:
    """An adaptation at work, before its first step."""

    model: Model
    adaptation: Adaptation
    lesson: Lesson

    @classmethod
    def of(cls, model: Model, recipe: str) -> Desk:
        model = planned(model, recipe)
        methods = Methods.of(model.train)
        assert methods.adaptation is not None
        return cls(model, methods.adaptation, prepared(model, methods.adaptation, methods))

    def disturbed(self, size: float = 0.05) -> Desk:
        """Every trained number moved, so that the adapter does something."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(7)
            for p in self.lesson.trained.values():
                p += size * torch.randn_like(p)
        return self

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        module: Any = self.lesson.module
        training = module.training
        hidden = self.adaptation.hidden(self.lesson)
        module.eval()
        out = module(IDS).logits if hidden is None else hidden(IDS) @ module.get_output_embeddings().weight.T
        module.train(training)
        return out.float()

    def batch(self) -> Batch:
        rows = examples_of(self.model)[0].rows
        return Stream(rows, 256, 256).step(0)[0]

    def loss(self) -> torch.Tensor:
        return loss_of(self.lesson.module, self.adaptation.hidden(self.lesson))(self.batch())

    def gradients(self) -> dict[str, torch.Tensor]:
        self.loss().backward()
        found = {name: p.grad.clone() for name, p in self.lesson.trained.items()}
        for p in self.lesson.trained.values():
            p.grad = None
        return found

    def delta(self) -> Delta:
        return self.adaptation.result(self.lesson, lambda name: self.lesson.trained[name].detach())

    def merged(self, folder: Path) -> Path:
        return write_trained(self.lesson.module, self.model, self.delta().weights, folder)

    def saved(self, folder: Path) -> Path:
        self.delta().write(folder, None)
        return folder

    @contextmanager
    def by_peft(self) -> Iterator[None]:
        """Within, the layers compute as peft wrote them."""
        ours = {layer: layer.__dict__.pop("forward") for layer in adapted(self.lesson).values()}
        yield
        for layer, forward in ours.items():
            layer.forward = forward


@torch.no_grad()
def reference(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    """Logits of a folder by transformers alone, or with an adapter put on it by peft."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    if adapter is not None:
        module = peft().PeftModel.from_pretrained(module, str(adapter))
    return module.eval()(IDS).logits


def numbers(adaptation: Adaptation, model: Model) -> int:
    return sum(math.prod(shape) for shape in adaptation.shapes(model.blueprint).values())


def only_the_adapter_learns(desk: Desk) -> None:
    desk.loss().backward()
    ours = {id(p) for p in desk.lesson.trained.values()}
    reached = {id(p) for p in desk.lesson.module.parameters() if p.grad is not None}
    assert reached <= ours and all(p.grad is not None for p in desk.lesson.trained.values())
    assert all(id(p) in ours for p in desk.lesson.module.parameters() if p.requires_grad)
    assert any(float(p.grad.abs().max()) > 0 for p in desk.lesson.trained.values())


def formula_is_what_is_allocated(desk: Desk) -> None:
    held = sum(p.numel() for p in desk.lesson.trained.values())
    assert numbers(desk.adaptation, desk.model) == held
    assert {p.dtype for p in desk.lesson.trained.values()} == {torch.float32}


def same_as_peft(desk: Desk, *, tolerance: float = 1e-5) -> None:
    """Logits and gradients of our layers are those of peft's own (without GPT-2's dropout)."""
    desk.lesson.module.eval()
    logits, gradients = desk.logits(), desk.gradients()
    with desk.by_peft():
        torch.testing.assert_close(desk.logits(), logits, atol=tolerance, rtol=tolerance)
        for name, theirs in desk.gradients().items():
            torch.testing.assert_close(gradients[name], theirs, atol=tolerance, rtol=1e-3, msg=name)


def learned(model: Model, recipe: str, folder: Path, *, to: float = 0.8, keeper: Keeper | None = None) -> Trained:
    """The run of a recipe; its loss falls to a share of what it was, in its own steps and on held-out rows."""
    done = run(planned(model, recipe), folder, keeper=keeper)
    losses = done.fitted.losses
    assert sum(losses[-3:]) < to * sum(losses[:3]), losses
    assert done.fitted.after < done.fitted.before
    return done
