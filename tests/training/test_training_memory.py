"""What is predicted, part by part, is what is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import asked

from fivefold.model import Model
from fivefold.recipe import catalogue
from fivefold.testing import tiny_model
from fivefold.testing.tiny import tiny_examples
from fivefold.training import attention, lean
from fivefold.training.batching import Stream
from fivefold.training.checkpoint import STATE, Keeper
from fivefold.training.cross_entropy import CHUNK, TOGETHER
from fivefold.training.memory import SLACK, Needs, needs
from fivefold.training.method import Adaptation, Methods, completed
from fivefold.training.module import loss_of
from fivefold.training.run import examples_of, prepared, run
from fivefold.weights import check_safetensors

KINDS = [(family, tied, recipe, dtype) for family, tied in (("llama", True), ("llama", False), ("qwen2", True),
                                                            ("gpt2", True))
         for recipe in ("lora(rank=4)", "full") for dtype in ("float32", "bfloat16")]


def predicted(model: Model, **more: Any) -> Needs:
    methods = Methods.of(completed(model.train))
    adaptation = methods.adaptation
    assert adaptation is not None
    optimizer = methods.update.optimizer(model.train) if methods.update else adaptation.default_optimizer()
    return needs(
        model.blueprint, model.train, methods, element=2 if model.train.dtype == "bfloat16" else 4, process=0.0,
        optimizer=optimizer, fused=adaptation.fused, whole=adaptation.whole, shapes=adaptation.shapes(model.blueprint),
        **more,
    )


@pytest.mark.parametrize(("family", "tied", "recipe", "dtype"), KINDS)
def test_every_part_is_what_is_allocated(tmp_path: Path, family: str, tied: bool, recipe: str, dtype: str) -> None:
    tiny = tiny_model(tmp_path / "model", family, layers=2, vocab=257, context=256, tied=tied)
    model = asked(tiny, tiny_examples(tmp_path / "rows.jsonl"), recipe, dtype=dtype, steps=1)
    told, methods = predicted(model), Methods.of(model.train)
    assert methods.adaptation is not None
    lesson = prepared(model, methods.adaptation, methods)
    assert told.weights == sum(p.nbytes for p in lesson.module.parameters())

    batch = Stream(examples_of(model)[0].rows, 512, 1 << 40).step(0)[0]
    loss_of(lesson.module)(batch).backward()
    gradients = [p.grad.nbytes for p in lesson.trained.values()]
    assert told.gradients == (sum(gradients) if recipe.startswith("lora") else max(gradients))

    run(model, tmp_path / "out", keeper=Keeper(tmp_path / "out", "k"))
    kept = check_safetensors(tmp_path / "out" / STATE)
    for part, size in (("state", told.state), ("beside", told.beside)):
        assert size == sum(t.nbytes for name, t in kept.items() if name.startswith(f"{part}/"))
    assert told.beside == (sum(p.nbytes for p in lesson.trained.values()) if dtype == "bfloat16" and recipe == "full"
                           else 0)


@pytest.mark.parametrize("recipe", ["lora(rank=4)", "full"])
@pytest.mark.parametrize("at_once", [512, 1024])
def test_activations_are_what_autograd_keeps(tmp_path: Path, recipe: str, at_once: int) -> None:
    tiny = tiny_model(tmp_path / "model", layers=4, vocab=257, context=256, width=128)
    model = asked(tiny, tiny_examples(tmp_path / "rows.jsonl", 128), recipe, at_once=at_once, tokens_per_step=at_once)
    methods = Methods.of(model.train)
    assert methods.adaptation is not None
    module = methods.adaptation.load(model, torch.float32)
    attention.use(module)
    lesson = type("Lesson", (), {"module": module, "extra": {}, "model": model})()
    trained = methods.adaptation.prepare(lesson)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    lean.install(module)
    seen: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.arange(at_once).view(-1, 256) % 250
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    assert sum(seen.values()) == pytest.approx(predicted(model).activations, rel=0.05)
    assert out.shape == (at_once // 256, 256, 128)


def test_checkpointed_layers_and_steps_without_gradients_keep_less(tiny_llama: Model, tmp_path: Path) -> None:
    model = asked(tiny_llama, tiny_examples(tmp_path / "rows.jsonl"))
    whole, none = predicted(model), predicted(model, kept_layers=0.0)
    assert none.activations < 0.7 * whole.activations
    assert predicted(asked(tiny_llama, tmp_path / "rows.jsonl", "mezo")).gradients == 0.0


def test_the_head_takes_one_chunk_and_the_gradients_of_some(tiny_llama: Model, tmp_path: Path) -> None:
    data = tiny_examples(tmp_path / "rows.jsonl")
    frozen, trained = (predicted(asked(tiny_llama, data, recipe, dtype="bfloat16", at_once=4096)).head
                       for recipe in ("lora", "full"))
    assert frozen == CHUNK * 257 * (2 + 2 + 4 + 4) and trained == frozen + TOGETHER * 257 * 2


@pytest.mark.parametrize("name", [n for n, t in catalogue().items() if issubclass(t, Adaptation)])
def test_it_is_known_whose_layers_are_blocks(tmp_path: Path, name: str) -> None:
    tiny = tiny_model(tmp_path / "model", layers=2, vocab=257, context=256)
    model = asked(tiny, tiny_examples(tmp_path / "rows.jsonl"), name, dtype="bfloat16", steps=4)
    methods = Methods.of(completed(model.train))
    assert methods.adaptation is not None
    lesson = prepared(model, methods.adaptation, methods)
    assert (lesson.extra["taken"].get("layer", 0) == 2) == methods.adaptation.blocks
    assert (predicted(model).unused == SLACK) == methods.adaptation.blocks


def test_the_peak_is_the_sum_with_slack_or_the_loading() -> None:
    parts = {"process": 1.0, "weights": 2.0, "beside": 4.0, "gradients": 8.0, "state": 16.0, "activations": 32.0,
             "head": 64.0}
    assert Needs(**parts).peak == 127 + SLACK * (8 + 32 + 64)
    assert Needs(**parts, loading=500.0).peak == 500.0
