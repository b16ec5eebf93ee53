"""A random model small enough for tests, in a Hugging Face folder, with a byte-level tokenizer trained on the spot.

Its widths are multiples of 32 (so that ggml's small blocks fit) and not of 256 (so that the large ones do not, as in
many small models). Same arguments, same folder: nothing in it depends on time or machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fivefold.model import Model, load

FAMILIES = ("llama", "qwen2", "gpt2")
END = "<|im_end|>"
TEXT = (
    "The quick brown fox jumps over the lazy dog, and 42 others watched it from the hill.\n"
    "Energy is measured in joules, memory in bytes, time in seconds; a token costs some of each.\n"
    "She sells sea shells by the sea shore. How many does she sell in a day? Nobody counted them.\n"
    "def count(words):\n    return {word: words.count(word) for word in set(words)}\n"
)


def tiny_model(
    folder: Path, family: str = "llama", *, layers: int = 3, width: int = 64, vocab: int = 320, context: int = 1024,
    tied: bool = True, seed: int = 0,
) -> Model:
    """Write the model into `folder` (made if need be) and load it. `family` is one of `FAMILIES`.

    `calibration.txt` beside the weights is a text long enough for a few calibration windows; the loaded Model uses it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, vocab)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = AutoModelForCausalLM.from_config(_config(family, layers, width, size, context, tied))
        for parameter in module.parameters():
            parameter.data += 0.08 * torch.randn_like(parameter)
        module.save_pretrained(folder)
    text = folder / "calibration.txt"
    text.write_text(TEXT * 240, encoding="utf-8")
    return load(folder).but(calibration=text)


def tiny_examples(path: Path, count: int = 64) -> Path:
    """Write labelled rows a tiny model can learn in a few steps: the label is said by one of two words in the text."""
    words = {"good": "yes", "bad": "no"}
    rows = [
        {"text": f"{name} sells a {kind} fox {i}", "label": label}
        for i in range(-(-count // 4)) for name in ("She", "He") for kind, label in words.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]), encoding="utf-8")
    return path


def write_tokenizer(folder: Path, vocab: int) -> int:
    """Train a byte-level BPE on `TEXT`, write it; the number of tokens it really has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return int(tokenizer.get_vocab_size())


def _config(family: str, layers: int, width: int, vocab: int, context: int, tied: bool) -> Any:
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    common = {"vocab_size": vocab, "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": 0}
    if family == "gpt2":
        return GPT2Config(n_positions=context, n_embd=width, n_layer=layers, n_head=2, **common)
    if family not in FAMILIES:
        raise ValueError(f"there is no tiny {family!r}; families: {', '.join(FAMILIES)}")
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
    return kind(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=context, **common,
    )
