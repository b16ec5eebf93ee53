import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fivefold.errors import ModelError, NotFinite
from fivefold.export import export
from fivefold.model import ExportPlan, RunPlan, load
from fivefold.weights import read_tensors, write_safetensors_folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_reads_the_same_function_in_the_dtype_asked_for(make, tmp_path, dtype):
    folder, reference = make("qwen3")
    model = export(load(folder).but(run=RunPlan(dtype=dtype)), tmp_path / "out")
    assert model.path == tmp_path / "out" and model.format == "safetensors"
    back = AutoModelForCausalLM.from_pretrained(model.path)
    for name, p in reference.state_dict().items():
        assert torch.equal(back.state_dict()[name], p.to(getattr(torch, dtype)))
    weights = sum(t.nbytes for _, t in read_tensors(model.path))
    assert f"{weights} bytes" in model.coverage[-1]
    assert weights * (2 if dtype == "bfloat16" else 1) == sum(t.nbytes for _, t in read_tensors(folder))
    assert json.loads((model.path / "config.json").read_text())["dtype"] == dtype


def test_integers_keep_their_type_and_nan_is_refused(make, tmp_path):
    folder, _ = make("llama")
    tensors = {name: t.numpy() for name, t in read_tensors(folder)}
    tensors["counter"] = np.arange(3)
    good = write_safetensors_folder(tmp_path / "good", tensors, like=folder)
    out = export(load(good).but(run=RunPlan(dtype="bfloat16")), tmp_path / "out").path
    assert dict(read_tensors(out))["counter"].dtype == "I64"
    tensors["model.norm.weight"][0] = np.nan
    bad = write_safetensors_folder(tmp_path / "bad", tensors, like=folder)
    with pytest.raises(NotFinite, match=r"model\.norm"):
        export(load(bad), tmp_path / "none")
    assert not (tmp_path / "none" / "model.safetensors").exists()


def test_gguf_does_not_become_safetensors(make, tmp_path):
    folder, _ = make("llama")
    model = export(load(folder).but(export=ExportPlan(format="gguf")), tmp_path / "out")
    with pytest.raises(ModelError, match="GGUF"):
        export(replace(model, export=ExportPlan()), tmp_path / "back")


def test_nothing_is_written_wider_than_it_is_stored(make, tmp_path):
    folder, _ = make("llama")
    half = export(load(folder).but(run=RunPlan(dtype="bfloat16")), tmp_path / "half")
    done = export(load(half.path).but(run=RunPlan(dtype="float32")), tmp_path / "out")
    before, after = (dict(read_tensors(path)) for path in (half.path, done.path))
    assert {t.dtype for t in after.values()} == {"BF16"}
    assert all((before[name].raw() == after[name].raw()).all() for name in before)
    assert json.loads((done.path / "config.json").read_text())["dtype"] == "bfloat16"
