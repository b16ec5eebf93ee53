"""Checkpointing gives the same gradients and lets go of what the layers made; its formula is what is kept."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import Desk, pupil
from masked import assert_same, trained
from torch.nn import functional as F

from fivefold.techniques._shared.modules import layers
from fivefold.techniques.finetuning.checkpoint_activations import CheckpointActivations
from fivefold.training.memory import layer_elements, needs
from fivefold.training.method import Methods
from fivefold.training.optimizer import Optimizer


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("adaptation", ["full()", "lora()"])
def test_gradients_are_the_same(tmp_path: Path, family: str, adaptation: str, share: float) -> None:
    model = pupil(tmp_path, family)
    plain = Desk.of(model, adaptation)
    saving = Desk.of(model, f"{adaptation} + checkpoint_activations(layers={share})")
    for desk in (plain, saving):
        desk.lesson.module.eval()
    expected = plain.gradients()
    for name, found in saving.gradients().items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6 if family == "llama" else 0, msg=name)


@pytest.mark.parametrize("adaptation", ["full()", "lora()"])
def test_a_whole_run_is_the_same_bit_for_bit(tmp_path: Path, adaptation: str) -> None:
    model = pupil(tmp_path, "qwen2", steps=4)
    plain = trained(model, adaptation, tmp_path / "plain")
    saving = trained(model, f"{adaptation} + checkpoint_activations()", tmp_path / "saving")
    assert saving.fitted.losses == plain.fitted.losses
    assert_same(saving.model, plain.model)


def kept(desk: Desk) -> dict[int, set[str]]:
    """Per layer the linear layers whose output is alive between the forward and the backward pass."""
    alive: dict[tuple[int, str], Any] = {}
    hooks = []
    for i, layer in enumerate(layers(desk.lesson.module)):
        for name, part in layer.named_modules():
            if name.endswith("_proj"):
                hooks.append(part.register_forward_hook(
                    lambda _m, _i, out, key=(i, name): alive.__setitem__(key, weakref.ref(out))
                ))
    loss = desk.loss()
    found: dict[int, set[str]] = {i: set() for i in range(len(layers(desk.lesson.module)))}
    for (i, name), ref in alive.items():
        if ref() is not None:
            found[i].add(name.rpartition(".")[2])
    for hook in hooks:
        hook.remove()
    loss.backward()
    return found


@pytest.mark.parametrize("adaptation", ["full()", "lora()"])
def test_a_checkpointed_layer_keeps_nothing_it_made(tmp_path: Path, adaptation: str) -> None:
    plain = kept(Desk.of(pupil(tmp_path, "qwen2"), adaptation))
    half = kept(Desk.of(pupil(tmp_path / "h", "qwen2"), f"{adaptation} + checkpoint_activations(layers=0.5)"))
    whole = kept(Desk.of(pupil(tmp_path / "w", "qwen2"), f"{adaptation} + checkpoint_activations()"))
    assert {"gate_proj", "up_proj"} <= plain[0] and {"gate_proj", "up_proj"} <= plain[1]
    assert not half[0] and half[1] == plain[1], "the first layers are the checkpointed ones"
    assert not whole[0] and not whole[1]


def test_scoring_does_not_run_anything_twice(tmp_path: Path) -> None:
    desk, calls = Desk.of(pupil(tmp_path), "full() + checkpoint_activations()"), 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    layers(desk.lesson.module)[0].mlp.register_forward_pre_hook(count)
    with torch.no_grad():
        desk.loss()
    assert calls == 1
    desk.loss().backward()
    assert calls == 3


@pytest.mark.parametrize(("share", "left"), [(0.0, 30.0), (0.5, 15.0), (1.0, 0.0), (0.51, 15.0)])
def test_the_formula_counts_the_layers_left(tmp_path: Path, share: float, left: float) -> None:
    model = pupil(tmp_path)
    blueprint = replace(model.blueprint, layers=30)
    saving = CheckpointActivations(layers=share)
    assert saving.kept_layers(blueprint) == left
    found = needs(blueprint, model.train, Methods(saving=saving), element=2, process=0, optimizer=Optimizer(),
                  fused=True, kept_layers=saving.kept_layers(blueprint))
    positions = model.train.at_once * 2
    expected = positions * (max(left, 1) * layer_elements(blueprint) + (30 - left) * blueprint.width)
    assert found.activations == expected


def test_what_is_computed_again_is_the_lean_layers_own(tmp_path: Path) -> None:
    """The sources of a marked tensor pass through autograd's hooks, so whoever packs them can drop them."""
    from fivefold.training import lean

    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    weight = torch.randn(3, 8, requires_grad=True)
    packed: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        out = lean.linear(lean.gated(gate * 1, up * 1), weight)
    assert sum(t.shape == gate.shape for t in packed) >= 4, "gate and up of the product, and again of the layer"
    (found,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(found, (F.silu(gate) * up).detach().sum(0).expand(3, 8))
