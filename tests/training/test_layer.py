"""A whole layer as one step: the model's own function and gradients, and memory that is used again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fivefold.testing.tiny import tiny_model
from fivefold.training import attention, layer, lean
from fivefold.training.cross_entropy import IGNORE, head_loss

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def module(folder: Path, *, lora: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        tiny_model(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if lora:
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(1)
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS), loaded)
        for name, p in loaded.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    return loaded.train()


def taken(model: Any) -> int:
    attention.use(model)
    count = layer.install(model)
    lean.install(model)
    return count


def loss(model: Any, tokens: torch.Tensor, **more: Any) -> torch.Tensor:
    hidden = model.model(input_ids=tokens, use_cache=False, **more).last_hidden_state
    targets = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), IGNORE)], 1)
    return head_loss(hidden, model.lm_head.weight, targets)


def two_segments(length: int) -> torch.Tensor:
    segment = torch.arange(length) > length // 3
    seen = (segment[:, None] == segment[None, :]) & torch.ones(length, length).tril().bool()
    return torch.zeros(2, 1, length, length).masked_fill(~seen, -torch.inf)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_every_gradient_are_the_models_own(tmp_path: Path, lora: bool, length: int, masked: bool) -> None:
    plain, fast = module(tmp_path / "m", lora=lora), module(tmp_path / "m", lora=lora)
    assert taken(fast) == 3
    tokens = torch.randint(0, 300, (2, length), generator=torch.Generator().manual_seed(0))
    more = {"attention_mask": two_segments(length)} if masked else {}
    for _ in range(2):  # the second step uses the first one's memory again
        found = []
        for model in (plain, fast):
            model.zero_grad()
            value = loss(model, tokens, **more)
            value.backward()
            found.append(value.item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    for (name, p), (_, q) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 1e-5 * p.grad.abs().max() + 1e-8, name


def test_frozen_weights_get_no_gradient_and_norms_may_be_trained_alone(tmp_path: Path) -> None:
    plain, fast = module(tmp_path / "m"), module(tmp_path / "m")
    taken(fast)
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    for model in (plain, fast):
        for name, p in model.named_parameters():
            p.requires_grad_("norm" in name or "layers.1.mlp.up" in name)
        loss(model, tokens).backward()
    for (name, p), (_, q) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (not p.requires_grad), name
        if p.grad is not None and q.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 1e-5 * p.grad.abs().max() + 1e-8, name


def test_parameters_stay_what_they_were_and_are_changed_in_place(tmp_path: Path) -> None:
    plain, fast = module(tmp_path / "m"), module(tmp_path / "m")
    taken(fast)
    for (name, p), (_, q) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for model in (plain, fast):
            for p in model.parameters():
                p.data.mul_(1.01)
    assert loss(plain, tokens).item() == pytest.approx(loss(fast, tokens).item(), rel=1e-6)


def test_without_gradients_the_usual_layers_run(tmp_path: Path) -> None:
    plain, fast = module(tmp_path / "m"), module(tmp_path / "m")
    taken(fast)
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert loss(plain, tokens).item() == pytest.approx(loss(fast, tokens).item(), rel=1e-6)


def test_a_step_keeps_no_more_than_the_formula_says(tmp_path: Path) -> None:
    """What the rooms of the layers hold after a step, besides workspace."""
    fast = module(tmp_path / "m")
    attention.use(fast)
    rooms: list[layer.Room] = []
    made = layer.Room.__init__

    def noted(self: layer.Room) -> None:
        made(self)
        rooms.append(self)

    patch = pytest.MonkeyPatch()
    patch.setattr(layer.Room, "__init__", noted)
    try:
        assert layer.install(fast) == 3
    finally:
        patch.undo()
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    loss(fast, tokens).backward()
    c = fast.config
    heads, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    formula = 4 * tokens.numel() * (2 * c.hidden_size + 2 * heads + 2 * keys + 2 * c.intermediate_size)
    for room in rooms[1:]:
        assert sum(block.nbytes for block in room.held.values()) == formula


@pytest.mark.parametrize("change", ["bias", "hook", "dropout"])
def test_what_it_does_not_know_it_leaves(tmp_path: Path, change: str) -> None:
    fast = module(tmp_path / "m", lora=change == "dropout")
    attention.use(fast)
    first = fast.model.layers[0]
    if change == "bias":
        first.self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(first.self_attn.q_proj.out_features))
    elif change == "hook":
        first.mlp.register_forward_hook(lambda *_: None)
    else:
        first.mlp.up_proj.lora_dropout["default"] = torch.nn.Dropout(0.5)
    assert layer.install(fast) == 2
    lean.install(fast)
    loss(fast, torch.randint(0, 300, (2, 24))).backward()


def test_another_family_is_left_alone(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_model(tmp_path / "q", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    attention.use(model)
    assert layer.install(model) == 0
