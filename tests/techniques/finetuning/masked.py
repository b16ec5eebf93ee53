"""A tiny model with examples, runs of it, and the plainest training loop as the oracle of the masking methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from fivefold.artifact import hash_folder
from fivefold.model import Model
from fivefold.recipe import Recipe
from fivefold.testing import tiny_model
from fivefold.testing.tiny import tiny_examples
from fivefold.training.batching import Stream, visible
from fivefold.training.checkpoint import Keeper
from fivefold.training.delta import Sparse
from fivefold.training.run import Trained, examples_of, run
from fivefold.weights import read_tensors


def pupil(folder: Path, family: str = "llama", *, rows: int = 64, **plan: Any) -> Model:
    """Two layers; six steps of 256 tokens in float32 unless `plan` says otherwise."""
    model = tiny_model(folder / family, family, layers=2, vocab=257, context=128)
    settings = {"steps": 6, "tokens_per_step": 256, "dtype": "float32", **plan}
    return model.but(train=replace(model.train, data=tiny_examples(folder / f"{rows}.jsonl", rows), **settings))


def planned(model: Model, recipe: str) -> Model:
    return Recipe.parse(recipe).plan(model)


class Stop(Exception):
    pass


def trained(model: Model, recipe: str, folder: Path, *, stop: int = 0, keeper: Keeper | None = None) -> Trained:
    """The run of a recipe; `stop` raises Stop during that step."""
    def listen(step: Any) -> None:
        if step.step == stop:
            raise Stop

    return run(planned(model, recipe), folder, listen=listen, keeper=keeper)


def resumed(model: Model, recipe: str, folder: Path, stop: int) -> Trained:
    """The run of a recipe, killed during step `stop` and gone on with by the checkpoint of the step before."""
    try:
        trained(model, recipe, folder / "killed", stop=stop, keeper=Keeper(folder, "run", every=0.0))
    except Stop:
        return trained(model, recipe, folder / "again", keeper=Keeper(folder, "run", every=0.0))
    raise AssertionError(f"step {stop} was never reached")


def tensors(model: Model) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(t.numpy()) for name, t in read_tensors(model.path)}


def differing(parent: Model, child: Model) -> dict[str, torch.Tensor]:
    """Where two models' stored tensors differ, by name; only tensors in which some number does."""
    before, after = tensors(parent), tensors(child)
    assert before.keys() == after.keys()
    found = {name: before[name] != after[name] for name in before}
    return {name: where for name, where in found.items() if where.any()}


def assert_same(a: Model, b: Model) -> None:
    assert not differing(a, b)


def assert_sparse_gives_it_back(parent: Model, done: Trained) -> Sparse:
    """The saved difference, applied to the parent, is the trained model bit for bit; no other model takes it."""
    sparse = Sparse.load(done.delta / "delta.safetensors")
    applied = sparse.apply(dict(read_tensors(parent.path)), hash_folder(parent.path))
    for name, tensor in read_tensors(done.model.path):
        given = applied[name]
        assert (tensor.numpy() == (given if not hasattr(given, "numpy") else given.numpy())).all(), name
    assert done.delta_bytes == (done.delta / "delta.safetensors").stat().st_size
    return sparse


def module(model: Model) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).train()


def stream(model: Model) -> Stream:
    plan = model.train
    return Stream(examples_of(model)[0].rows, plan.tokens_per_step, plan.at_once, plan.seed, plan.layout)


def plain_loss(model: Any, batches: list[Any]) -> torch.Tensor:
    """The mean loss of a step's learned tokens from the whole logits."""
    total, count = torch.zeros(()), 0
    for batch in batches:
        seen = torch.from_numpy(visible(batch))
        hide = torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)
        logits = model(input_ids=torch.from_numpy(batch.tokens), attention_mask=hide, use_cache=False,
                       position_ids=torch.from_numpy(batch.positions)).logits
        targets = torch.from_numpy(batch.targets).flatten()
        total = total + F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100, reduction="sum")
        count += int((targets != -100).sum())
    return total / count


def plain_training(
    model: Model, made: Any, names: list[str], steps: range, rate: float,
    mask: Callable[[int, Mapping[str, torch.nn.Parameter]], None] = lambda step, parameters: None,
) -> list[float]:
    """torch's AdamW on the named parameters of `made`; its schedule spans `steps`. The losses."""
    chosen = {name: p for name, p in made.named_parameters() if name in names}
    made.requires_grad_(False)
    for p in chosen.values():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(chosen.values(), lr=rate, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0)
    source, losses = stream(model), []
    for at, step in enumerate(steps):
        warm = max(1, round(model.train.warmup * len(steps)))
        share = min(1.0, (at + 1) / warm) * (1 + math.cos(math.pi * at / len(steps))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        loss = plain_loss(made, source.step(step))
        optimizer.zero_grad()
        loss.backward()
        mask(step, chosen)
        torch.nn.utils.clip_grad_norm_(chosen.values(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
