"""A model written without torch, a machine with round numbers, and trials made up by a formula."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fivefold.machine import Machine
from fivefold.metrics import METRICS
from fivefold.model import Model, load
from fivefold.quantity import Measurement, Quantity
from fivefold.study.trial import Outcome, Trial
from fivefold.testing.tiny import write_tokenizer
from fivefold.weights import write_safetensors

VOCAB, WIDTH, FFN, LAYERS, HEADS = 320, 64, 128, 3, 2


def bare_model(folder: Path) -> Model:
    """A random llama of 3 layers in a Hugging Face folder, with a tokenizer."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (WIDTH if n in "qo" else WIDTH // 2, WIDTH) for n in "qkvo"}
        shapes |= {f"{at}.mlp.{n}_proj.weight": (FFN, WIDTH) for n in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (WIDTH, FFN)}
        shapes |= {f"{at}.{n}_layernorm.weight": (WIDTH,) for n in ("input", "post_attention")}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 1, "vocab_size": VOCAB,
        "max_position_embeddings": 1024, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder, VOCAB)
    return load(folder)


def machine() -> Machine:
    """10 GB/s, 100 GFLOP/s, 2 cores."""
    rates = {"bandwidth.1": 5e9, "bandwidth.2": 1e10, "gemm.float32": 1e11, "gemm.bfloat16": 2e11}
    return Machine(
        id="m" * 64, cpu="made up", code="x", cores=2, isa=(), ram=8 << 30, gpus=(), os="Linux x86_64",
        rates={k: Quantity(value=v, unit="byte/s", method="measured") for k, v in rates.items()}, date="2026-01-01",
    )


def measured(values: Mapping[str, float], spread: float = 0.01) -> Measurement:
    """Quantities with an interval of +-`spread`."""
    return Measurement({
        name: Quantity(value=v, unit=METRICS[name].unit, method="measured", n=5,
                       low=v - spread * abs(v), high=v + spread * abs(v))
        for name, v in values.items()
    })


def trial(number: int, recipe: str, outcome: Outcome = Outcome.MEASURED, **values: float) -> Trial:
    made = measured(values)
    return Trial(number=number, recipe=recipe, outcome=outcome, measurement=made if outcome is Outcome.MEASURED else
                 Measurement({}), spent={"build": 1.0, "screen": 0.5, "measure": 2.0, "quality": 0.5})


def formula(recipe: str) -> dict[str, float]:
    """Metrics of a recipe by a formula, the same on every machine: bytes by type, time by bytes and threads."""
    from fivefold.recipe import Recipe

    bits, loss, speed, ttft = 32.0, 0.0, 0.25, 0.4
    for t in Recipe.parse(recipe):
        fields = vars(t)
        if t.name == "gguf":
            bits = {"q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5, "iq4_nl": 4.5}[fields["type"]]
            loss += 4.0 * 4.0 ** -(bits - 3.0) * (0.7 if fields["importance"] else 1.0)
            speed, ttft = 0.35, 0.2
        elif t.name == "threads":
            speed *= (1.0, 1.7)[fields["count"] - 1]
            ttft /= (1.0, 1.9)[fields["count"] - 1]
        elif t.name == "kv_cache":
            loss += {"f32": 0.0, "f16": 0.0, "q8_0": 0.002, "q4_0": 0.2}[fields["type"]]
            speed *= {"f16": 1.0}.get(fields["type"], 0.9)
        elif t.name == "prune_depth":
            bits, loss, speed = bits * 0.7, loss + 0.5 * fields["layers"], speed * 1.4
    size = bits * 1e5
    latency = size / 1e9 / speed
    return {
        "latency": latency, "size": size, "memory": size + 5e7, "energy": latency * 20.0, "ttft": ttft,
        "request": ttft + 60 * latency, "money": latency * 10.0, "network": size, "kl": loss,
        "agreement": 1.0 - 0.6 * loss**0.5 if loss < 1 else 0.3,
    }


TYPES = ("q8_0", "q5_1", "q5_0", "q4_0")
RECIPES = ["parent"] + [
    " + ".join(filter(None, [prune, gguf, cache, threads]))
    for prune in ("", "prune_depth(layers=1)")
    for gguf in ("", *(f'gguf(type="{t}"{i})' for t in TYPES for i in ("", ", importance=False")))
    for cache in ("", 'kv_cache(type="q8_0")', 'kv_cache(type="q4_0")') if gguf or not cache
    for threads in ("", "threads(count=1)", "threads(count=2)")
    if prune or gguf or cache or threads
]


def made_up_table() -> list[Trial]:
    """Every recipe of `RECIPES` measured by `formula`; two fail."""
    from fivefold.recipe import Recipe

    out = []
    for number, recipe in enumerate(RECIPES):
        text = str(Recipe.parse(recipe))
        values = formula(text)
        failed = 'q4_0' in text and "prune_depth" in text and "threads(count=2)" in text
        builds = "gguf" in text or "prune" in text
        screen = measured({"kl": values["kl"] * 1.1, "agreement": values["agreement"] * 0.99})
        spent = {"build": 10.0 if builds else 0.0, "screen": 1.0, "measure": 2 + 10 * values["request"], "quality": 2.0}
        out.append(Trial(
            number=number, recipe=text, outcome=Outcome.OUT_OF_MEMORY if failed else Outcome.MEASURED,
            sentence="used more than the cap" if failed else "", screen=Measurement({}) if failed else screen,
            measurement=Measurement({}) if failed else measured(values), spent=spent,
            artifact=str(Recipe.parse(text).build) if builds else None,
            made={"seconds": Quantity(value=10.0, unit="s", method="measured")} if builds else {},
        ))
    return out
