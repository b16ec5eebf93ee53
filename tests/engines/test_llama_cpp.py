"""llama.cpp against transformers with the same weights, and against itself."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from fivefold.engines import Sampling, llama_cpp, module, names
from fivefold.engines import _llama_abi as abi
from fivefold.engines._quantize import dequantize, quantize, row_bytes, types
from fivefold.engines._sampling import greedy
from fivefold.errors import DataError, ModelError, NotFinite, RecipeError
from fivefold.model import DecodePlan, Model, RunPlan, load

VOCAB, HEADS, KV_HEADS, LAYERS = 256, 2, 1, 2
PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]


def torch_llama(width: int, seed: int = 0) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=1024,
        tie_word_embeddings=False, initializer_range=0.15,
    )
    return LlamaForCausalLM(config).eval()


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's llama rotates neighbouring rows, transformers rotates halves: reorder the rows within each head."""
    rows, cols = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def gguf_tensors(network: Any) -> dict[str, np.ndarray]:
    renamed = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk.",
    }
    out = {}
    for name, value in network.state_dict().items():
        array = value.numpy().astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            array = paired(array, HEADS if "q_proj" in name else KV_HEADS)
        for old, new in renamed.items():
            name = name.replace(old, new)
        out[name] = array
    return out


def write_gguf(path: Path, network: Any, kind: str = "f32", importance: bool = False) -> Path:
    import gguf

    config = network.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, array in gguf_tensors(network).items():
        if array.ndim == 1 or kind == "f32":
            writer.add_tensor(name, array)
        else:
            weights = np.ones(array.shape[1], np.float32) if importance else None
            number = gguf.GGMLQuantizationType(types()[kind].number)
            writer.add_tensor(name, quantize(array, kind, weights), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def torch_scores(network: Any, tokens: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return torch.log_softmax(network(torch.tensor([tokens])).logits[0].double(), -1).numpy()


@pytest.fixture(scope="module")
def network() -> Any:
    return torch_llama(64)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, network: Any) -> Model:
    """F32 weights and an F32 cache, so that differences are rounding only."""
    model = load(write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", network))
    return model.but(run=RunPlan(cache_type="f32", threads=1))


@pytest.fixture(scope="module")
def session(tiny: Model) -> Any:
    opened = llama_cpp.open(tiny)
    yield opened
    opened.close()


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def test_the_folder_finds_the_engine() -> None:
    assert "llama.cpp" in names()
    assert module("llama.cpp") is llama_cpp


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_score_equals_transformers(session: Any, network: Any, length: int) -> None:
    tokens = text(length)
    scores = session.score(tokens)
    assert scores.shape == (length, VOCAB) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, torch_scores(network, tokens), atol=1e-4)


def test_a_longer_prompt_than_one_prefill_chunk(session: Any, network: Any) -> None:
    prompt = text(600, seed=1)
    [token] = session.generate(prompt, 1)
    assert token == torch_scores(network, prompt)[-1].argmax()


def test_greedy_text_is_the_argmax_of_score(session: Any) -> None:
    drawn = list(session.generate(PROMPT, 40))
    assert len(drawn) == 40
    scores = session.score(PROMPT + drawn)
    assert drawn == scores[len(PROMPT) - 1 : -1].argmax(1).tolist()


@pytest.mark.parametrize("drafted", [1, 3, 8])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_prompt_lookup_changes_no_token(session: Any, tiny: Model, drafted: int, temperature: float) -> None:
    quick = llama_cpp.open(tiny.but(decode=DecodePlan(lookup_tokens=drafted)))
    for seed in range(3):
        prompt = PROMPT * 3 + text(5, seed)
        sampling = Sampling(temperature=temperature, seed=seed)
        assert list(quick.generate(prompt, 60, sampling)) == list(session.generate(prompt, 60, sampling))
    quick.close()


def test_prompt_lookup_saves_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without attention the next token depends on the last alone, so greedy text must run into a cycle."""
    import torch

    forgetful = torch_llama(64)
    with torch.no_grad():
        for layer in forgetful.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    model = load(write_gguf(tmp_path / "cycle.gguf", forgetful)).but(run=RunPlan(threads=1))
    passes = []
    step = llama_cpp.Context.step
    monkeypatch.setattr(llama_cpp.Context, "step", lambda *a: passes.append(1) or step(*a))
    texts = []
    for drafted in (0, 4):
        passes.clear()
        opened = llama_cpp.open(model.but(decode=DecodePlan(lookup_tokens=drafted)))
        texts.append(list(opened.generate([1], 400)))
        opened.close()
    assert texts[0] == texts[1]
    assert len(passes) < 200


def test_batch_equals_one_by_one(session: Any, tiny: Model) -> None:
    prompts = [text(n, seed=n) for n in (3, 300, 40, 1, 17)]
    alone = [list(session.generate(prompt, 20)) for prompt in prompts]
    assert session.generate_batch(prompts, 20) == alone
    pairs = llama_cpp.open(tiny.but(run=replace(tiny.run, batch=2)))
    assert pairs.generate_batch(prompts, 20) == alone
    assert pairs.generate_batch(prompts, 0) == [[], [], [], [], []]
    assert pairs.generate_batch([], 5) == []
    pairs.close()


@pytest.mark.parametrize("drafted", [0, 3])
def test_sampling_follows_the_distribution(tiny: Model, drafted: int) -> None:
    """The second token given the first, over many seeds; with drafts its row comes from a verified pass."""
    drawing = llama_cpp.open(tiny.but(decode=DecodePlan(lookup_tokens=drafted)))
    temperature, draws = 0.5, 3000
    firsts, seconds = [], []
    for seed in range(draws):
        first, second = drawing.generate(PROMPT, 2, Sampling(temperature=temperature, seed=seed))
        firsts.append(first)
        seconds.append(second)
    common = max(set(firsts), key=firsts.count)
    for drawn, prompt in (
        (firsts, PROMPT),
        ([b for a, b in zip(firsts, seconds, strict=True) if a == common], [*PROMPT, common]),
    ):
        scores = drawing.score(prompt)[-1].astype(np.float64) / temperature
        expected = np.exp(scores - np.logaddexp.reduce(scores)) * len(drawn)
        observed = np.bincount(drawn, minlength=VOCAB)
        large = expected >= 5
        assert large.sum() >= 2
        p = chisquare([*observed[large], observed[~large].sum()], [*expected[large], expected[~large].sum()]).pvalue
        assert p > 1e-4
    drawing.close()


def test_stop_tokens_end_the_text_and_are_not_yielded(session: Any) -> None:
    drawn = list(session.generate(PROMPT, 20))
    stop = drawn[7]
    assert list(session.generate(PROMPT, 20, Sampling(stop=frozenset({stop})))) == drawn[: drawn.index(stop)]


def test_calls_do_not_disturb_each_other(session: Any) -> None:
    whole = list(session.generate(PROMPT, 10))
    early = session.generate(PROMPT, 10)
    assert [next(early), next(early)] == whole[:2]
    early.close()
    assert list(session.generate(PROMPT, 10)) == whole
    stale = session.generate(PROMPT, 10)
    next(stale)
    session.score(PROMPT)
    with pytest.raises(RuntimeError, match="another call"):
        next(stale)


@pytest.mark.parametrize("tokens", [[], [-1], [VOCAB], [[1, 2]]])
def test_bad_prompts_are_refused(session: Any, tokens: Any) -> None:
    for call in (session.score, lambda t: session.generate(t, 3), lambda t: session.generate_batch([t], 3)):
        with pytest.raises(DataError, match="token ids from 0 to 255"):
            call(tokens)


def test_the_context_of_the_plan_is_a_limit(tiny: Model) -> None:
    small = llama_cpp.open(tiny.but(run=replace(tiny.run, context=64)))
    assert len(list(small.generate(PROMPT, 56))) == 56
    with pytest.raises(DataError, match="65 tokens do not fit the context of 64"):
        small.generate(PROMPT, 57)
    small.close()
    with pytest.raises(RuntimeError, match="closed"):
        small.score(PROMPT)


CACHES = [("f32", 32, 1e-6), ("f16", 16, 0.01), ("bf16", 16, 0.15), ("q8_0", 8.5, 0.4), ("q4_0", 4.5, 4.0)]


@pytest.mark.parametrize(("kind", "bits", "most"), CACHES)
def test_cache_types(session: Any, tiny: Model, kind: str, bits: float, most: float) -> None:
    """The saved state of a sequence grows per token by its cache and a few bytes of bookkeeping."""
    opened = llama_cpp.open(tiny.but(run=replace(tiny.run, cache_type=kind)))
    sizes = []
    for length in (10, 110):
        scores = opened.score(text(length))
        sizes.append(opened._lib.llama_state_seq_get_size(opened._context._handle, 0))
    assert np.abs(scores - session.score(text(110))).max() < most
    said = opened.describe()
    assert said["cache_type"] == kind
    assert said["cache_bytes_per_token"] == 2 * LAYERS * KV_HEADS * 32 * bits / 8
    assert 0 <= (sizes[1] - sizes[0]) / 100 - said["cache_bytes_per_token"] <= 32
    opened.close()


def test_describe_reports_the_file(session: Any, tiny: Model) -> None:
    said = session.describe()
    matrices = LAYERS * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 2 * VOCAB * 64
    norms = (2 * LAYERS + 1) * 64
    assert said["weight_bytes"] == 4 * (matrices + norms)
    assert said["tensor_types"] == {"f32": 9 * LAYERS + 3} and said["dtype"] == "f32" and said["threads"] == 1
    assert said["file_bytes"] == tiny.path.stat().st_size


def test_unknown_and_unfit_cache_types_are_refused(tiny: Model, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no type 'q9'"):
        llama_cpp.open(tiny.but(run=replace(tiny.run, cache_type="q9")))
    narrow = load(write_gguf(tmp_path / "narrow.gguf", torch_llama(32)))
    opened = llama_cpp.open(narrow.but(run=RunPlan(cache_type="q8_0", threads=1)))
    with pytest.raises(ModelError, match="q8_0 cache"):
        opened.score(PROMPT)
    opened.close()


@pytest.fixture(scope="module")
def wide() -> Any:
    return torch_llama(256, seed=3)


@pytest.mark.parametrize("kind", [name for name in types() if name != "f32"])
def test_every_type_runs(wide: Any, tmp_path: Path, kind: str) -> None:
    """Oracle: transformers with the dequantized weights; what remains is the rounding of activations."""
    import torch

    opened = llama_cpp.open(load(write_gguf(tmp_path / "q.gguf", wide, kind, importance=True)))
    copy = torch_llama(256, seed=3)
    with torch.no_grad():
        for parameter in copy.parameters():
            if parameter.ndim == 2:
                array = parameter.numpy()
                stored = quantize(array, kind, np.ones(array.shape[1], np.float32))
                parameter.copy_(torch.from_numpy(dequantize(stored, kind, array.shape)))
    tokens = text(64)
    expected, got = torch_scores(copy, tokens), opened.score(tokens)
    divergence = (np.exp(expected) * (expected - got)).sum(1).mean()
    parent = (np.exp(expected) * (expected - torch_scores(wide, tokens))).sum(1).mean()
    assert opened.describe()["dtype"] == kind
    assert divergence < max(0.01, 0.1 * parent)
    assert (got.argmax(1) == expected.argmax(1)).mean() > 0.8
    opened.close()


def test_damaged_files_give_one_sentence(tiny: Model, tmp_path: Path) -> None:
    data = tiny.path.read_bytes()
    for size in (0, 3, 24, 200, 2000, len(data) // 2, len(data) - 1):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(data[:size])
        with pytest.raises(ModelError) as caught:
            llama_cpp.open(tiny.but(path=cut))
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError):
        llama_cpp.open(tiny.but(path=tmp_path / "absent.gguf"))


def test_a_wrong_shape_gives_the_reason_of_llama_cpp(tiny: Model, tmp_path: Path) -> None:
    data = tiny.path.read_bytes()
    key = b"llama.embedding_length" + (4).to_bytes(4, "little")
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(data.replace(key + (64).to_bytes(4, "little"), key + (96).to_bytes(4, "little")))
    with pytest.raises(ModelError, match=r"llama.cpp cannot load .*invalid n_rot: 32, expected 48"):
        llama_cpp.open(tiny.but(path=wrong))


FUZZ = """
import sys
from pathlib import Path
import numpy as np
from fivefold.engines import llama_cpp
from fivefold.errors import FivefoldError
from fivefold.model import load
data, folder = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
random = np.random.default_rng(0)
refused = 0
for trial in range(150):
    changed = bytearray(data)
    for place in random.integers(0, 2600, random.integers(1, 4)):
        changed[place] = random.integers(0, 256)
    file = folder / "fuzz.gguf"
    file.write_bytes(changed)
    print(trial, flush=True)
    try:
        session = llama_cpp.open(load(file))
        session.score([1, 2, 3])
        session.close()
    except FivefoldError as error:
        refused += 1
        assert "\\n" not in str(error)
print("refused", refused)
"""


def test_random_damage_never_ends_the_process(tiny: Model, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(tiny.path), str(tmp_path)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, (done.stdout[-200:], done.stderr[-2000:])
    assert int(done.stdout.split()[-1]) > 50


def test_row_bytes_is_what_ggml_says() -> None:
    _, lib = llama_cpp.abi.library()
    for name, kind in types().items():
        assert row_bytes(name, 768) == lib.ggml_row_size(kind.number, 768)


def test_a_row_is_what_numpy_makes_of_it(session: Any) -> None:
    context = session._fitting(8, outputs=1)
    row = context.prefill(session._checked(PROMPT, 8))
    values = np.array(row)
    assert values.shape == (VOCAB,) == (len(row),)
    assert row.argmax() == values.argmax() and row[3] == values[3]
    context.at(len(PROMPT) - 1)[7] = context.at(len(PROMPT) - 1)[200] = 99.0
    assert np.asarray(row)[200] == 99 and row.argmax() == 7
    for broken, place in ((float("nan"), 150), (float("inf"), 60)):
        context.at(len(PROMPT) - 1)[place] = broken
        with pytest.raises(NotFinite):
            greedy(row)
        context.at(len(PROMPT) - 1)[place] = 0.0
    context.at(len(PROMPT) - 1)[0] = float("-inf")
    assert greedy(row) == 7


def test_giving_pages_back_changes_no_token(session: Any) -> None:
    before = list(session.generate(PROMPT, 20))
    abi.give_back()
    assert list(session.generate(PROMPT, 20)) == before


@pytest.mark.parametrize("tokens", [[1.5], [[1, 2]], [], [-1], [VOCAB], [1 << 40], "ab"])
def test_what_is_no_prompt(session: Any, tokens: Any) -> None:
    with pytest.raises(DataError, match="one or more token ids"):
        session.generate(tokens, 1)
