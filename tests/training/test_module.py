"""The loss is transformers' own, whatever the head does; what is written is what was given, and the rest untouched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import alone, examples, gradients, module

from fivefold.errors import Misfit, ModelError
from fivefold.machine import Machine
from fivefold.model import Model, load
from fivefold.testing import tiny_model
from fivefold.testing.contract import sentence
from fivefold.training.batching import IGNORE, Stream
from fivefold.training.module import (
    computing_dtype,
    load_module,
    loss_of,
    packs,
    plain_head,
    stored_name,
    write_trained,
)
from fivefold.weights import read_tensors, write_safetensors

HEADS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "plain": ("Llama", {}, True), "tied": ("Qwen2", {"tie_word_embeddings": True}, True),
    "layer norm": ("GPT2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, True),
    "capped": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 5.0}, False),
    "divided": ("Granite", {"logits_scaling": 3.0}, False), "scaled": ("Cohere", {"logit_scale": 0.4}, False),
    "bias": ("Phi", {"num_key_value_heads": 4}, False),
    "capped, recurrent": ("RecurrentGemma", {"logits_soft_cap": 5.0}, False),
}


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_and_its_gradients_are_those_of_transformers(head: str) -> None:
    family, more, plain = HEADS[head]
    model = module(family, **more)
    assert plain_head(model) is plain
    batch = Stream(examples(6, 10, 30), 256, 256, layout="bucket").batches()[0]
    labels = np.full_like(batch.tokens, IGNORE)
    labels[:, 1:] = batch.targets[:, :-1]
    theirs = model(torch.from_numpy(batch.tokens), labels=torch.from_numpy(labels), use_cache=False).loss
    wanted = gradients(model, theirs)
    ours = loss_of(model)(batch)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-5)
    found = gradients(model, ours)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("head", ["plain", "tied", "capped", "divided"])
def test_the_loss_of_packed_rows_is_that_of_the_examples(head: str) -> None:
    model = module(HEADS[head][0], **HEADS[head][1]).eval()
    rows = examples(9, 10, 30)
    batches = Stream(rows, 256, 256).batches()
    assert all(batch.segments is not None for batch in batches)
    with torch.no_grad():
        total = sum(float(loss_of(model)(batch)) * batch.learned for batch in batches)
        sums, counts = zip(*(alone(model, row) for row in rows), strict=True)
    assert total / sum(batch.learned for batch in batches) == pytest.approx(float(sum(sums)) / sum(counts), abs=1e-5)


def test_other_hidden_states_may_be_given() -> None:
    model = module("Llama").eval()
    batch = Stream(examples(3, 10, 30), 256, 256, layout="bucket").batches()[0]
    loss = loss_of(model, lambda tokens, **more: model.base_model(input_ids=tokens, **more).last_hidden_state * 0)
    assert float(loss(batch).detach()) == pytest.approx(np.log(97), abs=1e-5)


@pytest.mark.parametrize(("family", "more", "can"), [
    ("Llama", {}, True), ("GPT2", {}, True), ("Gemma2", {"head_dim": 8}, True),
    ("Mistral", {"sliding_window": 60}, True), ("Mistral", {"sliding_window": 59}, False),
    ("Gemma3Text", {"head_dim": 8, "sliding_window": 16}, False),
    ("Mamba", {}, False), ("RecurrentGemma", {}, False), ("Bloom", {}, False),
    ("Lfm2", {"layer_types": ["conv", "full_attention"]}, False),
])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_sees_examples_apart_may_be_packed(
    family: str, more: dict[str, Any], can: bool, dtype: torch.dtype
) -> None:
    model = module(family, **more).to(dtype).eval()
    assert packs(model, 60) is can
    rows, loss = examples(8, 50, 60), loss_of(model)
    if can and dtype == torch.float32:
        with torch.no_grad():
            losses = [sum(float(loss(b)) * b.learned for b in Stream(rows, 256, 256, layout=layout).batches())
                      for layout in ("pack", "bucket")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_small_leak_along_the_row_is_noticed() -> None:
    model = module("Llama").eval()
    model.model.norm.register_forward_hook(lambda part, given, out: out + 0.01 * out.roll(1, 1))
    assert not packs(model, 60)


def test_loading(tiny_llama: Model, tmp_path: Path) -> None:
    model = load_module(tiny_llama)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in load_module(tiny_llama, torch.bfloat16).parameters()} == {torch.bfloat16}
    shutil.copytree(tiny_llama.path, tmp_path / "half")
    halves = {name: torch.from_numpy(t.numpy()).bfloat16() for name, t in read_tensors(tiny_llama.path)}
    write_safetensors(tmp_path / "half" / "model.safetensors", halves)
    assert {p.dtype for p in load_module(load(tmp_path / "half")).parameters()} == {torch.bfloat16}
    with pytest.raises(Misfit, match="no torch graph"):
        load_module(tiny_llama.but(format="gguf"))
    (tmp_path / "half" / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(ModelError) as caught:
        load_module(tiny_llama.but(path=tmp_path / "half"))
    assert "nonsense" in sentence(caught.value)


def test_the_computing_dtype_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert computing_dtype("float32") == torch.float32 and computing_dtype("bfloat16") == torch.bfloat16
    for isa, wanted in (("amx", torch.bfloat16), ("bf16", torch.bfloat16), ("avx2", torch.float32)):
        probed = type("Probed", (), {"isa": [isa]})
        monkeypatch.setattr(Machine, "probe", lambda probed=probed: probed)
        assert computing_dtype("auto") == wanted


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_what_was_given_and_the_rest_untouched(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    model = tiny_model(tmp_path / "model", family, layers=2, vocab=257)
    stored = {name: torch.from_numpy(t.numpy()).to(dtype) for name, t in read_tensors(model.path)}
    write_safetensors(model.path / "model.safetensors", stored)
    loaded = load_module(model, torch.float32)
    changed = [name for name, p in loaded.named_parameters()
               if p.ndim == 2 and ("1" in name or "emb" in name or "wte" in name)]
    values = {name: torch.randn(loaded.get_parameter(name).shape) for name in changed}
    folder = write_trained(loaded, model, {n: lambda v=v: v for n, v in values.items()}, tmp_path / "out")
    before, after = dict(read_tensors(model.path)), dict(read_tensors(folder))
    assert before.keys() == after.keys() and len(changed) > 4
    on_disk = {stored_name(loaded, before, name): value for name, value in values.items()}
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype and tensor.shape == before[name].shape
        if name in on_disk:
            assert torch.equal(torch.from_numpy(tensor.numpy()), on_disk[name].to(dtype).float())
        else:
            assert np.array_equal(tensor.raw(), before[name].raw())
    again = load_module(load(folder), torch.float32)
    for name, value in values.items():
        assert torch.equal(again.get_parameter(name), value.to(dtype).float())
    assert {f.name for f in folder.iterdir()} >= {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_parameter_that_is_not_stored_is_named(tiny_llama: Model) -> None:
    loaded = load_module(tiny_llama)
    with pytest.raises(ModelError, match=r"model\.absent is not in the weight files"):
        stored_name(loaded, dict(read_tensors(tiny_llama.path)), "model.absent")


@pytest.mark.parametrize(("head", "whole"), [("plain", False), ("capped", False), ("divided", True)])
def test_only_a_head_beyond_a_soft_cap_makes_all_logits(head: str, whole: bool) -> None:
    model = module(HEADS[head][0], **HEADS[head][1]).eval()
    calls: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    loss_of(model)(Stream(examples(3, 10, 30), 256, 256, layout="bucket").batches()[0])
    assert bool(calls) is whole
