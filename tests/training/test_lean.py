"""Lean layers are the model's own function with less kept; what is not is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from small import COMMON, gradients, module
from torch import nn
from torch.nn import functional as F

from fivefold.model import Blueprint, blueprint_of
from fivefold.training import attention, lean
from fivefold.training.memory import layer_elements

TOKENS = torch.arange(60).view(2, 30) * 7 % 96 + 1
FAMILIES = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8}, "Gemma": {"head_dim": 8}, "Gemma2": {"head_dim": 8},
    "Olmo2": {}, "Phi3": {}, "GPT2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
TAKEN = {
    "Llama": (5, 2, 15), "Qwen2": (5, 2, 15), "Qwen3": (9, 2, 15), "Gemma": (5, 0, 15), "Gemma2": (9, 0, 15),
    "Olmo2": (9, 2, 15), "Phi3": (5, 0, 9), "GPT2": (0, 0, 1),
}


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    logits = model(TOKENS, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    return float(loss.detach()), gradients(model, loss)


def same(one: tuple[float, dict[str, torch.Tensor]], other: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in other[1].items():
        torch.testing.assert_close(one[1][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_stay(family: str) -> None:
    model = module(family, **FAMILIES[family])
    plain = loss_and_gradients(model)
    assert len(plain[1]) == len(dict(model.named_parameters()))
    taken = lean.install(model)
    assert (taken["norm"], taken["gated"], taken["linear"]) == TAKEN[family] and not taken["adapter"]
    same(loss_and_gradients(model), plain)


@pytest.mark.parametrize("trained", ["norm", "q_proj", "down_proj", "layers.0", "bias", "embed"])
def test_frozen_weights_get_no_gradient_and_the_others_theirs(trained: str) -> None:
    model = module("Qwen2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    plain = loss_and_gradients(model)
    assert 0 < len(plain[1]) < len(dict(model.named_parameters()))
    lean.install(model)
    same(loss_and_gradients(model), plain)


def adapted(family: str = "Llama", **changes: Any) -> Any:
    model = module(family)
    config = LoraConfig(r=4, lora_alpha=6.0, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
                        **changes)
    inject_adapter_in_model(config, model)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma"])
@pytest.mark.parametrize("whole", [False, True])
def test_adapters_of_peft(family: str, whole: bool) -> None:
    model = adapted(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(whole or "lora_" in name)
    plain = loss_and_gradients(model)
    assert len(plain[1]) >= 20
    taken = lean.install(model)
    assert (taken["adapter"], taken["linear"]) == (10, 5)
    same(loss_and_gradients(model), plain)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_dropout": 0.5}, {"use_rslora": True}])
def test_only_plain_adapters_are_taken(changes: dict[str, Any]) -> None:
    model = adapted(**changes)
    torch.manual_seed(0)
    plain = loss_and_gradients(model)
    taken = lean.install(model)
    assert taken["adapter"] == (10 if "use_rslora" in changes else 0)
    torch.manual_seed(0)
    same(loss_and_gradients(model), plain)


def test_a_second_or_merged_adapter_is_left_alone() -> None:
    two, merged = adapted(), adapted()
    for part in two.modules():
        if hasattr(part, "lora_A"):
            part.update_layer("other", 2, lora_alpha=1, config=LoraConfig(r=2))
            part.set_adapter(["default", "other"])
    for part in merged.modules():
        if hasattr(part, "merge"):
            part.merge()
    for model in (two, merged):
        model.requires_grad_(True)
        plain = loss_and_gradients(model)
        assert lean.install(model)["adapter"] == 0
        same(loss_and_gradients(model), plain)


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class LoudRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight * 1.1


class OddMLP(nn.Module):
    def __init__(self, middle: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.act_fn, self.middle = nn.GELU() if middle == "gelu" else nn.SiLU(), middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.middle == "multiplier":
            gate = gate * 1.5
        out: torch.Tensor = self.down_proj(up * self.act_fn(gate))
        return out + x if self.middle == "residual" else out


def test_other_functions_of_the_same_names_are_left_alone() -> None:
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm

    odd = nn.Sequential(Scaled(8, 8), LoudRMSNorm(), *(OddMLP(m) for m in ("gelu", "multiplier", "residual", "plain")),
                        Gemma3nRMSNorm(8), nn.RMSNorm(8))
    with torch.no_grad():
        odd[6].weight.uniform_(0.5, 2.0)
    x = torch.randn(3, 8)
    before = [part(x).detach() for part in odd]
    assert lean.install(odd) == {"norm": 1, "gated": 1, "linear": 12, "adapter": 0}
    assert [i for i, part in enumerate(odd) if "forward" in vars(part)] == [5, 6]
    for part, was in zip(odd, before, strict=True):
        torch.testing.assert_close(part(x).detach(), was)


def test_a_layer_that_somebody_changed_stays_changed() -> None:
    model = module("Llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = lambda x: F.linear(x, layer.weight) * 3
    plain = loss_and_gradients(model)
    assert lean.install(model)["linear"] == 14
    same(loss_and_gradients(model), plain)


def test_in_bfloat16_it_is_as_near_as_the_plain_layers() -> None:
    exact = module("Llama")
    wanted = loss_and_gradients(exact)[1]
    model = module("Llama").to(torch.bfloat16)
    plain = loss_and_gradients(model)[1]
    lean.install(model)
    ours = loss_and_gradients(model)[1]

    def off(found: dict[str, torch.Tensor]) -> float:
        return sum(float((found[n].float() - g).norm() / g.norm()) for n, g in wanted.items()) / len(wanted)

    assert off(ours) < 1.1 * off(plain) and off(plain) < 0.05


def kept(model: Any, rows: int, length: int) -> int:
    """Bytes that autograd keeps for a pass over random tokens: each storage once, the model's own left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.dtype.is_floating_point:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(1, 96, (rows, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    total = sum(seen.values())
    out.sum().backward()
    return total


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Granite"])
@pytest.mark.parametrize("adapters", [False, True])
def test_what_is_kept_is_what_the_formula_says(family: str, adapters: bool) -> None:
    sizes = {**COMMON, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 24}
    sizes.pop("pad_token_id") if family == "SmolLM3" else None
    counts, blueprint = [], None
    for layers in (2, 4):
        model = module(family, **{**sizes, "num_hidden_layers": layers})
        blueprint = blueprint_of(model.config.to_dict())
        if adapters:
            inject_adapter_in_model(LoraConfig(r=1, target_modules="all-linear"), model)
        assert attention.use(model) is (family != "Mistral") and lean.install(model)["gated"] == layers
        counts.append(kept(model, 3, 40))
    assert isinstance(blueprint, Blueprint)
    per_layer = (counts[1] - counts[0]) / 2
    assert per_layer / (4 * 120) == pytest.approx(layer_elements(blueprint), rel=0.03)


def test_less_is_kept_than_by_autograd() -> None:
    plain = kept(module("Llama"), 2, 40)
    model = module("Llama")
    attention.use(model)
    lean.install(model)
    assert kept(model, 2, 40) < 0.6 * plain
