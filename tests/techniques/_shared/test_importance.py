from __future__ import annotations

import json

import numpy as np
import pytest

from fivefold.errors import DataError
from fivefold.techniques._shared import importance
from fivefold.techniques._shared.calibration import leads_set_aside, windows
from fivefold.techniques._shared.importance import importance_file
from fivefold.training.module import load_module
from fivefold.weights import check_safetensors


def brute_force(model, name: str, tokens: np.ndarray) -> np.ndarray:
    """Mean square per column by keeping every input of one layer."""
    module = load_module(model)
    kept = []
    part = module.get_submodule(name)
    part.register_forward_pre_hook(lambda _, args: kept.append(args[0].numpy().reshape(-1, args[0].shape[-1])))
    import torch

    for row in tokens:
        module(torch.tensor(row[None]))
    return (np.concatenate(kept).astype(np.float64) ** 2).mean(0)


LAYERS = {
    "llama": {
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj",
        "blk.2.ffn_down.weight": "model.layers.2.mlp.down_proj",
    },
    "qwen2": {
        "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj",
        "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj",
    },
    "gpt2": {
        "blk.1.attn_qkv.weight": "transformer.h.1.attn.c_attn",
        "blk.0.ffn_down.weight": "transformer.h.0.mlp.c_proj",
    },
}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
@pytest.mark.parametrize("family", LAYERS)
def test_importance_is_the_mean_square_of_each_column(tiny, family, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(importance, "fast_dtype", lambda: dtype)
    model = tiny(family)
    file, count = importance_file(model, 3)
    stored = check_safetensors(file)
    tokens = windows(model, 3)
    assert count == tokens.size == 3 * 128
    for exported, name in LAYERS[family].items():
        np.testing.assert_allclose(stored[exported].numpy(), brute_force(model, name, tokens), rtol=tolerance)
    head = brute_force(model, "lm_head", tokens)
    np.testing.assert_allclose(stored["token_embd.weight"].numpy(), head, rtol=tolerance)


def test_every_matrix_has_its_vector_and_an_untied_embedding_has_ones(tiny, monkeypatch):
    from fivefold.techniques._shared.gguf_types import matrices

    monkeypatch.setattr(importance, "fast_dtype", lambda: "float32")
    model = tiny("llama", tied=False)
    stored = check_safetensors(importance_file(model, 2)[0])
    widths = {name: (columns,) for name, (_, columns) in matrices(model).items()}
    assert {name: t.shape for name, t in stored.items()} == widths
    assert (stored["token_embd.weight"].numpy() == 1).all()
    head = brute_force(model, "lm_head", windows(model, 2))
    np.testing.assert_allclose(stored["output.weight"].numpy(), head, rtol=1e-4)


def test_windows_do_not_overlap_and_stay_in_the_text(tiny):
    model = tiny()
    from tokenizers import Tokenizer

    decode = Tokenizer.from_file(str(model.tokenizer_file)).decode
    for numbers in (700, 40_000):
        text = " ".join(f"{i:05d}" for i in range(numbers))
        model.calibration.write_text(text)
        starts = [text.index(decode(row.tolist())) for row in windows(model, 30, 100)]
        assert min(np.diff(starts)) >= 100
        assert starts[-1] > 0.9 * len(text)


def test_short_text_is_refused_in_one_sentence(tiny):
    model = tiny()
    model.calibration.write_text("too short")
    with pytest.raises(DataError, match=r"gives 9 tokens, and 8 calibration windows of 128 need 1024"):
        windows(model, 8)
    with pytest.raises(DataError, match="cannot be read"):
        windows(model.but(calibration=model.path / "nowhere.txt"), 8)


def test_the_bundled_text_is_the_calibration_split_of_the_tasks(tiny, monkeypatch, tmp_path):
    from fivefold import bundled
    from fivefold.tasks.text import documents

    file = tmp_path / "leads.json"
    file.write_text(json.dumps({f"{i}": {"title": f"title {i}", "extract": f"lead {i}. " * 30} for i in range(200)}))
    monkeypatch.setattr(bundled, "fetch", lambda name: file)
    leads = {f"title {i}": f"lead {i}. " * 30 for i in range(200)}
    assert leads_set_aside(leads) == documents("encyclopedia", "calibration")
    judged = {*documents("encyclopedia", "evaluation"), *documents("encyclopedia", "screen")}
    assert len(judged) == 120 and not judged & set(leads_set_aside(leads))
    assert windows(tiny().but(calibration=None), 4, 100).shape == (4, 100)
