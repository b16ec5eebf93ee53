import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fivefold.errors import ModelError
from fivefold.model import Blueprint, Trait, blueprint_of, load

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def test_blueprint_counts_parameters_as_the_real_model_has_them() -> None:
    blueprint = blueprint_of(LLAMA)
    norms = 61 * 576
    assert blueprint.parameters + norms == 134_515_008  # SmolLM2-135M as published
    assert blueprint.cache_bytes_per_token(2) == 23_040


def test_operations_of_one_token_by_hand() -> None:
    blueprint = Blueprint(family="llama", layers=1, width=4, heads=2, kv_heads=1, head_dim=2, ffn=8, vocab=10,
                          context=16, tied=False)
    matrices = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 8 + 10 * 4
    attention = 2 * (2 * 2 * 2 * 3)  # scores and mixture: 2 heads, width 2, 3 keys, multiply and add
    assert blueprint.flops_per_token(2) == 2 * matrices + attention
    assert blueprint.parameters == matrices + 40


def test_gpt2_speaks_its_older_names() -> None:
    blueprint = blueprint_of({"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 11,
                              "n_positions": 32})
    assert (blueprint.ffn, blueprint.kv_heads, blueprint.tied, blueprint.gated) == (32, 2, True, False)


@pytest.mark.parametrize("change", [
    {"num_hidden_layers": 10**9}, {"hidden_size": -1}, {"hidden_size": "576"}, {"num_attention_heads": 0},
    {"num_key_value_heads": 2}, {"vocab_size": 3.5}, {"num_hidden_layers": True}, {"vocab_size": None},
])
def test_absurd_shapes_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ModelError) as caught:
        blueprint_of({**LLAMA, **change})
    assert "\n" not in str(caught.value)


@given(st.dictionaries(st.sampled_from(sorted(LLAMA)), st.none() | st.integers() | st.text(max_size=5) | st.floats()))
def test_any_config_is_a_blueprint_or_refused(change: dict[str, object]) -> None:
    try:
        blueprint_of({**LLAMA, **change})
    except ModelError as error:
        assert "\n" not in str(error)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="bundled name"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize(("files", "needle"), [
    ({}, "no config.json"), ({"config.json": "{"}, "not readable JSON"), ({"config.json": "[1]"}, "not an object"),
    ({"config.json": json.dumps(LLAMA)}, "no weights"),
    ({"config.json": json.dumps(LLAMA), "pytorch_model.bin": "x"}, "only pickled weights"),
    ({"config.json": json.dumps({**LLAMA, "auto_map": {"AutoModel": "x.y"}})}, "remote code"),
    ({"config.json": json.dumps(LLAMA), "model.safetensors": "x" * 20}, "model.safetensors"),
    ({"config.json": "[" * 100_000}, "not readable JSON"),
])
def test_unusable_folders_get_one_sentence(tmp_path: Path, files: dict[str, str], needle: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=needle) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(ModelError):
        load(tmp_path / "model.gguf")


def test_traits_only_go_away(tmp_path: Path) -> None:
    from fivefold.model import Model

    model = Model(name="x", path=tmp_path, format="safetensors", blueprint=blueprint_of(LLAMA))
    fewer = model.without(Trait.TRAINABLE)
    assert fewer.traits == frozenset(Trait) - {Trait.TRAINABLE}
    assert model.parent is model and fewer.but(origin=model).parent is model
