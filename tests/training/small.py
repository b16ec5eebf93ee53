"""Small random modules of several families, and random examples for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from fivefold.model import Model, TrainPlan
from fivefold.recipe import Recipe
from fivefold.training.data import Example
from fivefold.training.loop import Fitted, Group, fit, windows

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": 0,
    "pad_token_id": 0,
}


def module(family: str, *, seed: int = 0, kind: str = "ForCausalLM", **changes: Any) -> Any:
    """A float32 model of transformers, every number of it random; in training mode, all of it trainable."""
    import transformers

    if family == "GPT2":
        config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=2048,
                                         bos_token_id=None, eos_token_id=0, **changes)
        made = transformers.GPT2LMHeadModel
    else:
        config = getattr(transformers, f"{family}Config")(**{**COMMON, **changes})
        made = getattr(transformers, f"{family.removesuffix('Text')}{kind}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = made._from_config(config)
        for parameter in out.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return out.train()


def examples(count: int, shortest: int, longest: int, *, seed: int = 0, vocab: int = VOCAB) -> list[Example]:
    """Random tokens, the last third of each learned."""
    draw = np.random.default_rng(seed)
    out = []
    for i in range(count):
        length = int(draw.integers(shortest, longest + 1))
        learn = np.arange(length) >= min(length - 1, 2 * length // 3)
        out.append(Example(draw.integers(1, vocab, length), learn, i + 1, draw.bytes(32)))
    return out


def alone(model: Any, row: Example) -> tuple[torch.Tensor, int]:
    """(sum of the losses of an example's learned tokens, their number), by the model's own logits."""
    tokens = torch.from_numpy(row.tokens)[None]
    logs = torch.log_softmax(model(tokens, use_cache=False).logits[0].double(), -1)
    learned = torch.from_numpy(row.learn[1:]).nonzero().squeeze(-1)
    return -logs[learned, tokens[0, learned + 1]].sum(), len(learned)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient by name of every parameter that has one; cleared from the model."""
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def plan(**changes: Any) -> TrainPlan:
    return TrainPlan(**{"steps": 12, "learning_rate": 0.05, **changes})


class Net(torch.nn.Module):
    """A small regression. `scale` sets the size of its gradients."""

    def __init__(self, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.first = torch.nn.Parameter(torch.randn(6, 5, generator=draw).to(dtype))
        self.second = torch.nn.Parameter(torch.randn(1, 6, generator=draw).to(dtype))
        self.x, self.scale = torch.randn(64, 5, generator=draw), scale

    def loss(self, rows: Any) -> torch.Tensor:
        x = self.x[torch.as_tensor(rows)]
        hidden = torch.tanh(F.linear(x.to(self.first.dtype), self.first))
        out = F.linear(hidden, self.second).float().squeeze(-1)
        return self.scale * (out - x.sum(-1)).square().mean()

    def score(self) -> float:
        with torch.no_grad():
            return float(self.loss(range(64)))

    def fit(self, told: TrainPlan, at_once: int = 16, **more: Any) -> Fitted:
        stream = windows(np.arange(64), 16, told.seed, at_once)
        return fit(told, [Group(parameters=dict(self.named_parameters()))], self.loss, stream,
                   more.pop("score", self.score), **more)


def asked(model: Model, data: Path, recipe: str = "lora(rank=4, rate=0.01)", **changes: Any) -> Model:
    """The model with a plan to train it on `data` by `recipe`."""
    told = {"data": data, "steps": 12, "tokens_per_step": 512, "dtype": "float32", "held_out": 0.25, **changes}
    return Recipe.parse(recipe).plan(model.but(train=replace(model.train, **told)))
