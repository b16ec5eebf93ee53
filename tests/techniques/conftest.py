"""Tiny random models of several families, with a byte tokenizer and a calibration text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fivefold.model import Model, load

TEXT = "The quick brown fox jumps over the lazy dog, and 42 others watched it from the hill.\n" * 60


def _config(family: str, tied: bool, layers: int, width: int) -> object:
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    common = {"vocab_size": 256, "max_position_embeddings": 128, "tie_word_embeddings": tied}
    if family == "gpt2":
        return GPT2Config(vocab_size=256, n_positions=128, n_embd=width, n_layer=layers, n_head=2,
                          bos_token_id=0, eos_token_id=0)
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
    return kind(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
                num_key_value_heads=1, **common)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Model]:
    """tiny(family="llama", tied=True, layers=3, width=64) -> a random Model with calibration text, scratch."""

    def make(family: str = "llama", tied: bool = True, layers: int = 3, width: int = 64) -> Model:
        import torch
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import AutoModelForCausalLM

        folder = tmp_path / f"{family}-{tied}-{layers}-{width}"
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(_config(family, tied, layers, width))
        for parameter in module.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        module.save_pretrained(folder)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(folder / "tokenizer.json"))
        text = tmp_path / "calibration.txt"
        text.write_text(TEXT, encoding="utf-8")
        return load(folder).but(calibration=text, work=tmp_path / "work")

    return make
