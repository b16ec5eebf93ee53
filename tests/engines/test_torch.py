"""The torch engine against transformers' own forward and generate, and against llama.cpp on the same weights."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fivefold.engines import Sampling, open_session, torch_
from fivefold.engines._layers.packed import pack, unpack, write_packed
from fivefold.errors import DataError, ModelError, NotFinite
from fivefold.model import DecodePlan, Model, load
from fivefold.testing import tiny_model

PROMPT = [5, 17, 33, 5, 17, 40, 41, 5, 17]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def session(model: Model) -> torch_.TorchSession:
    return torch_.open(model)


def peer(model: Model) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model.path, local_files_only=True).eval()


def with_lookup(model: Model, tokens: int) -> torch_.TorchSession:
    return torch_.open(model.but(decode=DecodePlan(lookup_ngram=1, lookup_tokens=tokens)))


def test_scores_are_the_log_softmax_of_the_logits(
    model: Model, session: torch_.TorchSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        want = peer(model)(torch.tensor([PROMPT])).logits[0].double().log_softmax(-1).numpy()
    assert np.allclose(session.score(PROMPT), want, atol=1e-5)
    monkeypatch.setattr(torch_, "SCORED", 4)
    assert np.allclose(session.score(PROMPT), want, atol=1e-5)


def test_greedy_text_equals_transformers_generate(model: Model, session: torch_.TorchSession) -> None:
    want = peer(model).generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=40, eos_token_id=None)
    got = list(session.generate(PROMPT, 40))
    assert got == want[0, len(PROMPT):].tolist()
    assert list(session.generate(PROMPT, 0)) == []


def test_stop_ends_the_text_and_is_not_yielded(session: torch_.TorchSession) -> None:
    free = list(session.generate(PROMPT, 40))
    stop = free[20]
    assert list(session.generate(PROMPT, 40, Sampling(stop=frozenset({stop})))) == free[: free.index(stop)]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9, seed=3)], ids=["top", "drawn"])
def test_prompt_lookup_changes_nothing_but_the_number_of_passes(
    model: Model, session: torch_.TorchSession, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = with_lookup(model, 6)
    passes: list[int] = []
    forward = fast._forward
    monkeypatch.setattr(fast, "_forward", lambda rows, cache, keep: passes.append(keep) or forward(rows, cache, keep))
    prompt = PROMPT * 6
    want = list(session.generate(prompt, 60, sampling))
    assert list(fast.generate(prompt, 60, sampling)) == want
    assert max(passes) > 1
    if sampling.temperature == 0:
        assert len(passes) < 60


def test_drawn_tokens_follow_the_models_distribution(model: Model) -> None:
    fast = with_lookup(model, 4)
    prompt = PROMPT * 3
    pairs = [tuple(fast.generate(prompt, 2, Sampling(temperature=0.3, seed=s))) for s in range(300)]
    first = fast.score(prompt)[-1] / 0.3
    p = np.exp(first - first.max())
    p /= p.sum()
    counts = np.bincount([a for a, _ in pairs], minlength=fast.vocab)
    top = int(p.argmax())
    assert abs(counts[top] / 300 - p[top]) < 4 * np.sqrt(p[top] * (1 - p[top]) / 300) + 1e-9
    second = fast.score([*prompt, top])[-1] / 0.3
    q = np.exp(second - second.max())
    q /= q.sum()
    after = [b for a, b in pairs if a == top]
    best = int(q.argmax())
    assert abs(after.count(best) / len(after) - q[best]) < 4 * np.sqrt(q[best] * (1 - q[best]) / len(after)) + 1e-9


def test_a_batch_of_unequal_prompts_equals_one_by_one(model: Model, session: torch_.TorchSession) -> None:
    prompts = [PROMPT, PROMPT[:3], [40], PROMPT * 2, [7, 8]]
    alone = [list(session.generate(p, 12)) for p in prompts]
    assert session.generate_batch(prompts, 12) == alone
    pairs = torch_.open(model.but(run=replace(model.run, batch=2)))
    assert pairs.generate_batch(prompts, 12) == alone
    assert session.generate_batch([], 12) == []


def test_bad_tokens_and_too_long_texts_are_refused(model: Model, session: torch_.TorchSession) -> None:
    for bad in ([], [-1], [session.vocab]):
        with pytest.raises(DataError, match="token ids"):
            session.score(bad)
    small = torch_.open(model.but(run=replace(model.run, context=16)))
    with pytest.raises(DataError, match="context of 16"):
        small.generate(PROMPT, 8)
    small.close()
    with pytest.raises(RuntimeError, match="closed"):
        small.score([1])


def test_describe_counts_the_weights(model: Model, session: torch_.TorchSession) -> None:
    described = session.describe()
    assert described["engine"] == "torch"
    assert described["weight_bytes"] >= 4 * sum(p.numel() for p in peer(model).parameters())
    shape = model.blueprint
    assert described["cache_bytes_per_token"] == 2 * 4 * shape.layers * shape.kv_heads * shape.head_dim
    half = torch_.open(model.but(run=replace(model.run, dtype="bfloat16")))
    assert half.describe()["weight_bytes"] < 0.6 * described["weight_bytes"]
    assert 0 < np.abs(half.score(PROMPT) - session.score(PROMPT)).max() < 0.2


def test_damaged_folders_are_told_in_one_sentence(tmp_path: Path) -> None:
    from fivefold.weights import read_tensors, write_safetensors

    model = tiny_model(tmp_path / "m")
    tensors = {name: stored.numpy() for name, stored in read_tensors(model.path)}
    lost = {k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}
    write_safetensors(model.path / "model.safetensors", lost)
    with pytest.raises(ModelError, match="lacks the weights"):
        torch_.open(model)
    config = model.path / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"no_such_family"'))
    with pytest.raises(ModelError, match="cannot load") as caught:
        torch_.open(model)
    assert "\n" not in str(caught.value)


def test_weights_that_overflow_are_a_typed_failure(tmp_path: Path) -> None:
    from fivefold.weights import read_tensors, write_safetensors

    model = tiny_model(tmp_path / "m")
    tensors = {name: stored.numpy() for name, stored in read_tensors(model.path)}
    tensors["model.embed_tokens.weight"][:] = np.nan
    write_safetensors(model.path / "model.safetensors", tensors)
    with pytest.raises(NotFinite):
        torch_.open(model).score(PROMPT)


def test_a_packed_folder_is_served(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    name = "model.layers.0.mlp.up_proj"
    packed = load(write_packed(model.path, tmp_path / "p", {name: (4, 32)}))
    session = torch_.open(packed)
    reference = peer(model)
    weight = reference.get_submodule(name).weight
    weight.data = unpack(pack(weight.data, 4, 32))
    with torch.inference_mode():
        want = reference(torch.tensor([PROMPT])).logits[0].log_softmax(-1).numpy()
    assert np.abs(session.score(PROMPT) - want).max() < 0.05
    assert session.describe()["tensor_types"]["int4"] == 1


def test_llama_cpp_gives_the_same_loss_and_text_from_the_same_weights(tmp_path: Path) -> None:
    from fivefold.export import export

    model = tiny_model(tmp_path / "m")
    gguf = export(model.but(export=replace(model.export, format="gguf", default="f32")), tmp_path / "g")
    ours, theirs = torch_.open(model), open_session(gguf.but(run=replace(gguf.run, cache_type="f32", threads=1)))
    ids = np.random.default_rng(0).integers(0, ours.vocab, 200).tolist()
    losses = [-s.score(ids)[np.arange(199), ids[1:]].mean() for s in (ours, theirs)]
    assert abs(losses[0] - losses[1]) < 5e-5
    assert list(ours.generate(ids[:30], 30)) == list(theirs.generate(ids[:30], 30))
