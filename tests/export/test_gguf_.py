import errno
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from fivefold.engines import open_session
from fivefold.errors import ModelError, NotFinite, StoreError
from fivefold.export import export, gguf_
from fivefold.export.gguf_ import exported_tensors
from fivefold.model import ExportPlan, RunPlan, load
from fivefold.weights import gguf_header, read_tensors, write_safetensors_folder, write_solved

TOKENS = [0, 5, 90, 17, 3, 44, 61, 8, 95, 2, 33, 33, 70, 12, 51, 6] * 3
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 32}
CASES = {
    "llama": {},
    "llama untied": {"tie_word_embeddings": False},
    "llama tied": {"tie_word_embeddings": True},
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "llama all heads": {"num_key_value_heads": 4},
    "llama wide heads": {"head_dim": 32},
    "llama linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    "llama llama3": {"rope_parameters": LLAMA3},
    "mistral": {"sliding_window": None},
    "qwen2": {}, "qwen3": {}, "gpt2": {}, "gemma": {},
    "gemma2": {"sliding_window": 16},
    "gemma2 scale": {"query_pre_attn_scalar": 144, "sliding_window": 64},
    "gemma3_text": {"sliding_window": 16, "num_hidden_layers": 7},
    "gemma3_text scale": {"query_pre_attn_scalar": 144, "num_hidden_layers": 7},
}


def log_probs(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1).numpy()


def exported(folder: Path, out: Path, **plan):
    run = RunPlan(cache_type="f32", threads=1, context=128)
    return export(load(folder).but(export=ExportPlan(format="gguf", **plan), run=run), out)


@pytest.mark.parametrize("case", CASES)
def test_the_engine_computes_what_transformers_computes(make, tmp_path, case):
    folder, reference = make(case.split()[0], **CASES[case])
    session = open_session(exported(folder, tmp_path / "out"))
    scores = session.score(TOKENS)
    session.close()
    gap = np.abs(scores - log_probs(reference, TOKENS))
    assert gap.max() < 4e-3 and gap.mean() < 5e-4


def types_of(model) -> dict[str, str]:
    return {t.name: t.type for t in gguf_header(model.path).tensors}


def stored(model, name: str) -> np.ndarray:
    tensor = next(t for t in gguf.GGUFReader(model.path).tensors if t.name == name)
    return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape)))


def test_the_plans_types_are_obeyed_and_counted(make, tmp_path):
    folder, _ = make("llama", attention_bias=True)
    model = exported(folder, tmp_path / "out", default="q8_0", embedding="f16",
                     types={"blk.1.ffn_up.weight": "q4_0", "blk.0.attn_v.weight": "bf16"})
    types = types_of(model)
    assert types.pop("token_embd.weight") == "F16" and types.pop("blk.1.ffn_up.weight") == "Q4_0"
    assert types.pop("blk.0.attn_v.weight") == "BF16"
    assert {t for n, t in types.items() if n.endswith((".bias", "norm.weight"))} == {"F32"}
    assert {t for n, t in types.items() if not n.endswith((".bias", "norm.weight"))} == {"Q8_0"}
    size = model.path.stat().st_size
    assert model.coverage[0] == f"gguf: 16 matrices (13 Q8_0, 1 F16, 1 BF16, 1 Q4_0), 13 vectors F32; {size} bytes"
    assert model.format == "gguf" and gguf_header(model.path).metadata["general.file_type"] == 7
    assert load(model.path).blueprint == load(folder).blueprint


def test_packed_values_are_ggmls_own(make, tmp_path):
    folder, _ = make("llama")
    name, source = "blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"
    matrix = dict(read_tensors(folder))[source].numpy()
    for kind in ("q8_0", "q4_0"):
        ours = stored(exported(folder, tmp_path / kind, default=kind), name)
        theirs = gguf.GGMLQuantizationType[kind.upper()]
        np.testing.assert_array_equal(ours, gguf.dequantize(gguf.quantize(matrix, theirs), theirs))


def test_a_type_that_does_not_fit_is_refused_before_anything_is_written(make, tmp_path):
    folder, _ = make("llama")
    with pytest.raises(ModelError) as caught:
        exported(folder, tmp_path / "out", default="q4_0", types={"blk.0.attn_q.weight": "q4_k"})
    said = str(caught.value)
    assert "q4_k does not fit 1 tensors" in said and "blk.0.attn_q.weight with rows of 64" in said and "iq4_nl" in said
    assert not (tmp_path / "out").exists()
    for plan, word in (({"default": "q9"}, "q9"), ({"types": {"blk.7.ffn_up.weight": "f16"}}, "blk.7.ffn_up.weight"),
                       ({"types": {"blk.0.ffn_up.weight": "iq1_s"}}, "iq1_s")):
        with pytest.raises(ModelError, match=word):
            exported(folder, tmp_path / "out", **plan)


def test_solved_tensors_take_precedence(make, tmp_path):
    folder, _ = make("llama")
    name = "blk.0.ffn_down.weight"
    wanted = np.random.default_rng(1).normal(size=(64, 96)).astype(np.float32)
    packed = gguf.quantize(wanted, gguf.GGMLQuantizationType.Q8_0)
    solved = write_solved(tmp_path / "solved", {name: ("q8_0", packed)})
    model = exported(folder, tmp_path / "out", default="q4_0", solved=solved)
    assert types_of(model)[name] == "Q8_0"
    assert np.abs(stored(model, name) - wanted).max() < 0.02
    short = write_solved(tmp_path / "short", {name: ("q8_0", packed[:-1])})
    with pytest.raises(ModelError, match="bytes"):
        exported(folder, tmp_path / "out2", default="q4_0", solved=short)
    assert not list((tmp_path / "out2").iterdir())


def test_importance_moves_the_error_to_columns_that_matter_less(make, tmp_path):
    folder, _ = make("llama")
    name = "blk.0.ffn_down.weight"
    weights = np.where(np.arange(96) % 4 == 0, 1000, 1).astype(np.float32)
    save_file({name: weights}, tmp_path / "importance.safetensors")
    exact = dict(read_tensors(folder))["model.layers.0.mlp.down_proj.weight"].numpy()
    plain = stored(exported(folder, tmp_path / "a", default="q4_0"), name)
    file = tmp_path / "importance.safetensors"
    aware = stored(exported(folder, tmp_path / "b", default="q4_0", importance=file), name)
    assert (weights * (aware - exact) ** 2).sum() < 0.9 * (weights * (plain - exact) ** 2).sum()
    save_file({name: weights[:-1]}, tmp_path / "wrong.safetensors")
    with pytest.raises(ModelError, match=name):
        exported(folder, tmp_path / "c", default="q4_0", importance=tmp_path / "wrong.safetensors")


def test_bfloat16_folders_are_read(make, tmp_path):
    _folder, reference = make("qwen2")
    reference.bfloat16().save_pretrained(tmp_path / "bf16")
    model = exported(tmp_path / "bf16", tmp_path / "out")
    expected = reference.model.layers[0].mlp.up_proj.weight.float().detach().numpy()
    np.testing.assert_array_equal(stored(model, "blk.0.ffn_up.weight"), expected)


def changed(folder: Path, to: Path, edit) -> Path:
    tensors = {name: t.numpy() for name, t in read_tensors(folder)}
    edit(tensors)
    return write_safetensors_folder(to, tensors, like=folder)


@pytest.mark.parametrize("edit, error, word", [
    (lambda t: t["model.norm.weight"].__setitem__(0, np.nan), NotFinite, "model.norm.weight"),
    (lambda t: t["model.layers.0.mlp.up_proj.weight"].__setitem__(0, np.inf), NotFinite, "up_proj"),
    (lambda t: t.__setitem__("model.layers.0.extra.weight", np.ones(3, np.float32)), ModelError, "extra"),
    (lambda t: t.pop("lm_head.weight"), ModelError, "lm_head"),
    (lambda t: t["model.layers.0.mlp.up_proj.weight"].__setitem__(0, 1e6), ModelError, "blk.0.ffn_up|65504"),
])
def test_what_cannot_be_written_is_said_and_leaves_nothing(make, tmp_path, edit, error, word):
    folder, _ = make("llama", tie_word_embeddings=False)
    bad = changed(folder, tmp_path / "bad", edit)
    with pytest.raises((error, NotFinite), match=word):
        exported(bad, tmp_path / "out", default="f16")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("family, changes, word", [
    ("llama", {"hidden_act": "gelu"}, "gelu"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ("gemma3_text", {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, "pattern"),
])
def test_what_llama_cpp_would_compute_differently_is_refused(make, tmp_path, family, changes, word):
    folder, _ = make(family, **changes)
    with pytest.raises(ModelError, match=word):
        exported(folder, tmp_path / "out")


def test_a_sliding_window_that_is_not_applied_is_reported(make, tmp_path):
    folder, _ = make("mistral", sliding_window=32)
    assert any("sliding window of 32" in note for note in exported(folder, tmp_path / "out").coverage)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(make, tmp_path, monkeypatch):
    folder, _ = make("llama")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf_, "pack", full)
    with pytest.raises(StoreError, match="No space left"):
        exported(folder, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_techniques_can_plan_with_the_exported_names(make, tmp_path):
    folder, _ = make("gpt2")
    planned = exported_tensors(folder)
    assert planned["blk.0.attn_qkv.weight"].shape == (192, 64) and planned["blk.0.attn_qkv.weight"].is_matrix
    assert not planned["position_embd.weight"].is_matrix and not planned["blk.0.attn_qkv.bias"].is_matrix
    model = exported(folder, tmp_path / "out", default="q8_0")
    assert {t.name: t.shape for t in gguf_header(model.path).tensors} == {n: t.shape for n, t in planned.items()}


def test_a_gguf_model_stays_as_it_is(make, tmp_path):
    folder, _ = make("llama")
    model = exported(folder, tmp_path / "out")
    assert export(model, tmp_path / "again") is model and not (tmp_path / "again").exists()
