from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file

from fivefold.engines import open_session
from fivefold.errors import ModelError, NotFinite, StoreError
from fivefold.export import export
from fivefold.export.gguf_ import exported_tensors
from fivefold.model import ExportPlan, RunPlan, load
from fivefold.weights import gguf_header, read_tensors, write_safetensors_folder, write_solved

TOKENS = [0, 5, 90, 17, 3, 44, 61, 8, 95, 2, 33, 33, 70, 12, 51, 6] * 3
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
CASES = {
    "llama": {},
    "llama untied": dict(tie_word_embeddings=False),
    "llama tied": dict(tie_word_embeddings=True),
    "llama biases": dict(attention_bias=True, mlp_bias=True),
    "llama all heads": dict(num_key_value_heads=4),
    "llama wide heads": dict(head_dim=32),
    "llama linear": dict(rope_parameters=dict(rope_type="linear", rope_theta=5000.0, factor=4.0)),
    "llama llama3": dict(rope_parameters=LLAMA3),
    "mistral": dict(sliding_window=None),
    "qwen2": {}, "qwen3": {}, "gpt2": {}, "gemma": {},
    "gemma2": dict(sliding_window=16),
    "gemma2 scale": dict(query_pre_attn_scalar=144, sliding_window=64),
    "gemma3_text": dict(sliding_window=16, num_hidden_layers=7),
    "gemma3_text scale": dict(query_pre_attn_scalar=144, num_hidden_layers=7),
}


def log_probs(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1).numpy()


def exported(folder: Path, out: Path, **plan):
    model = load(folder).but(export=ExportPlan(format="gguf", **plan), run=RunPlan(cache_type="f32", threads=1, context=128))
    return export(model, out)


@pytest.mark.parametrize("case", CASES)
def test_the_engine_computes_what_transformers_computes(make, tmp_path, case):
    folder, reference = make(case.split()[0], **CASES[case])
    session = open_session(exported(folder, tmp_path / "out"))
    scores = session.score(TOKENS)
    session.close()
    gap = np.abs(scores - log_probs(reference, TOKENS))
    print("GAP", case, gap.max(), gap.mean(), scores.std())
    assert gap.max() < 5e-3
