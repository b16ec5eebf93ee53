"""Tiny random Hugging Face folders of each exportable family."""

from pathlib import Path
from typing import Any

import pytest

SHAPE = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}


def config_of(family: str, **changes: Any) -> Any:
    import transformers as t

    if family == "gpt2":
        return t.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0,
                            eos_token_id=1, **changes)
    kind = {"llama": t.LlamaConfig, "mistral": t.MistralConfig, "qwen2": t.Qwen2Config, "qwen3": t.Qwen3Config,
            "gemma": t.GemmaConfig, "gemma2": t.Gemma2Config, "gemma3_text": t.Gemma3TextConfig}[family]
    return kind(**{**SHAPE, **changes})


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """make("qwen2", hidden_size=32) -> (folder, the transformers model in float32)."""

    def build(family: str, **changes: Any) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(family, **changes), attn_implementation="eager").float()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim == 1:
                    p.add_(0.3 * torch.randn_like(p))
                elif "embed" not in name and "wte" not in name:
                    p.mul_(3)
        folder = tmp_path / f"hf-{family}"
        model.eval().save_pretrained(folder)
        return folder, model

    return build
