"""A tiny model with examples, an adapter in it, and what transformers and peft make of the same files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
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
from fivefold.training.memory import layer_elements
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
    def logits(self, ids: torch.Tensor = IDS) -> torch.Tensor:
        module: Any = self.lesson.module
        training = module.training
        hidden = self.adaptation.hidden(self.lesson)
        module.eval()
        out = module(ids).logits if hidden is None else hidden(ids) @ module.get_output_embeddings().weight.T
        module.train(training)
        return out.float()

    def batch(self, tokens: int = 256) -> Batch:
        rows = examples_of(self.model)[0].rows
        return Stream(rows, tokens, tokens).step(0)[0]

    def loss(self, tokens: int = 256) -> torch.Tensor:
        return loss_of(self.lesson.module, self.adaptation.hidden(self.lesson))(self.batch(tokens))

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
        layers = [part for layer in adapted(self.lesson).values() for part in layer.modules()]
        ours = {part: part.__dict__.pop("forward") for part in layers if "forward" in part.__dict__}
        assert len(ours) >= len(adapted(self.lesson))
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


def same_when_layers_are_run_again(model: Model, recipe: str) -> None:
    """Checkpointed layers give the gradients they gave."""
    one, other = Desk.of(model, recipe), Desk.of(model, f"{recipe} + checkpoint_activations")
    for desk in (one, other):
        desk.disturbed().lesson.module.eval()
    theirs = one.gradients()
    for name, gradient in other.gradients().items():
        assert torch.equal(gradient, theirs[name]), name


def keeps_what_the_formula_says(folder: Path, recipe: str) -> None:
    """Bytes that autograd keeps for a layer and a position, from what two layers more keep."""
    held = {}
    for layers in (2, 4):
        model = tiny_model(folder / f"deep{layers}", layers=layers, width=128, vocab=257, context=512)
        data = tiny_examples(folder / "rows.jsonl")
        desk = Desk.of(model.but(train=replace(model.train, data=data, steps=2, dtype="bfloat16")), recipe)
        own = {p.untyped_storage().data_ptr() for p in desk.lesson.module.parameters()}
        seen: dict[int, torch.Tensor] = {}

        def keep(t: torch.Tensor, own: set[int] = own, seen: dict[int, torch.Tensor] = seen) -> torch.Tensor:
            if t.untyped_storage().data_ptr() not in own:
                seen[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            desk.loss(512)
        held[layers] = sum(t.untyped_storage().nbytes() for t in seen.values()) / 2 / 512
    formula = layer_elements(model.blueprint) + desk.adaptation.kept(model.blueprint)
    assert (held[4] - held[2]) / 2 / formula == pytest.approx(1.0, abs=0.04)


def learned(model: Model, recipe: str, folder: Path, *, to: float = 0.8, keeper: Keeper | None = None) -> Trained:
    """The run of a recipe; its loss falls to a share of what it was, in its own steps and on held-out rows."""
    done = run(planned(model, recipe), folder, keeper=keeper)
    losses = done.fitted.losses
    assert sum(losses[-3:]) < to * sum(losses[:3]), losses
    assert done.fitted.after < done.fitted.before
    return done


def beside(desk: Desk, folder: Path) -> Model:
    """The model with the adapter as it is now beside its weights, as a run leaves it."""
    from fivefold.training.loop import Fitted
    from fivefold.training.run import _finished

    fitted = Fitted(before=0.0, after=0.0, best_step=0, steps=0, seconds=0.0, history=(), losses=(), state_bytes=0,
                    value=lambda name: desk.lesson.trained[name].detach())
    return _finished(desk.model, folder, desk.adaptation, desk.lesson, fitted).model.without(*desk.adaptation.breaks)


def served_alike(desk: Desk, folder: Path) -> Model:
    """Exported, opened again and served by the torch engine, the model answers as the one that was trained."""
    from fivefold.artifact import Made, Store
    from fivefold.engines import open_session
    from fivefold.export import export
    from fivefold.model import DecodePlan, load

    trained = beside(desk, folder / "run")
    made = Store(folder / "store").put("a" * 64, lambda at: Made(model=export(trained, at), recipe="-", seconds=1.0))
    assert {n.split("/")[1] for n in made.manifest["files"] if n.startswith("adapter/")} == set(desk.delta().files)
    model = load(made.path)
    assert model.traits == trained.traits and model.blueprint == trained.blueprint
    logs = [one.log_softmax(-1) for one in desk.logits()]
    session = open_session(model)
    for ids, want in zip(IDS.tolist(), logs, strict=True):
        torch.testing.assert_close(torch.from_numpy(session.score(ids)), want, atol=1e-4, rtol=1e-4)
    prompts = [IDS[0, :9].tolist() * 3, IDS[1, 4:8].tolist()]
    texts = [greedy(desk, prompt, 24) for prompt in prompts]
    assert [list(session.generate(p, 24)) for p in prompts] == texts == session.generate_batch(prompts, 24)
    assert "adapter" in session.describe()
    quick = open_session(model.but(decode=DecodePlan(lookup_ngram=1, lookup_tokens=4)))
    assert [list(quick.generate(p, 24)) for p in prompts] == texts
    return model


@torch.no_grad()
def greedy(desk: Desk, prompt: list[int], count: int) -> list[int]:
    """The likeliest words, each from a pass over the whole text."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(desk.logits(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt):]
