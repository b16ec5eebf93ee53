"""An adapter beside the weights that cannot be read is refused in one sentence, never left out."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fivefold.engines import _bottleneck, open_session
from fivefold.errors import ModelError
from fivefold.model import Model, Trait, load
from fivefold.testing import tiny_model
from fivefold.weights import write_safetensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a bottleneck adapter, random enough to matter."""
    model = tiny_model(tmp_path_factory.mktemp("tiny") / "model", layers=2)
    torch.manual_seed(0)
    names = ("attention", "ffn")
    shapes = {"down": (4, 64), "down_bias": (4,), "up": (64, 4), "up_bias": (64,)}
    tensors = {f"{i}.{place}.{n}": torch.randn(s) for i in range(2) for place in names for n, s in shapes.items()}
    for name, content in _bottleneck.files(4, tensors).items():
        place = model.path / "adapter" / name
        place.parent.mkdir(exist_ok=True)
        if name.endswith(".json"):
            place.write_text(json.dumps(content), encoding="utf-8")
        else:
            write_safetensors(place, content)
    return model.path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "model")
    return tmp_path / "model"


def opened(folder: Path) -> Model:
    model = load(folder)
    assert Trait.PLAIN_GRAPH not in model.traits
    return model


def test_it_is_put_in(folder: Path, copied: Path) -> None:
    shutil.rmtree(copied / "adapter")
    plain, adapted = open_session(load(copied)), open_session(opened(folder))
    assert Trait.PLAIN_GRAPH in load(copied).traits and "adapter" not in plain.describe()
    assert abs(plain.score([5, 6, 7]) - adapted.score([5, 6, 7])).max() > 0.1
    more = adapted.describe()["weight_bytes"] - plain.describe()["weight_bytes"]
    assert more == 2 * 2 * 4 * (2 * 4 * 64 + 4 + 64)


@pytest.mark.parametrize(("name", "content", "match"), [
    ("bottleneck.json", "{", "no adapter this version reads"),
    ("bottleneck.json", '{"kind": "bottleneck", "version": 2, "size": 4}', "no adapter this version reads"),
    ("bottleneck.json", '{"kind": "bottleneck", "version": 1, "size": 8}', r"does not fit the model at 0\.attention"),
    ("bottleneck.safetensors", "", "truncated or no safetensors file"),
])
def test_a_damaged_one_is_refused(copied: Path, name: str, content: str, match: str) -> None:
    (copied / "adapter" / name).write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=match) as caught:
        open_session(opened(copied))
    assert "\n" not in str(caught.value)


def test_one_of_another_depth_is_refused(copied: Path) -> None:
    tensors = {"0.attention.down": torch.zeros(4, 64)}
    write_safetensors(copied / "adapter" / _bottleneck.WEIGHTS, tensors)
    with pytest.raises(ModelError, match=r"does not fit the model at 0\.attention\.down_bias"):
        open_session(opened(copied))


def test_an_empty_folder_is_refused(copied: Path) -> None:
    for file in (copied / "adapter").iterdir():
        file.unlink()
    with pytest.raises(ModelError, match="holds no adapter that the torch engine knows"):
        open_session(opened(copied))


def test_an_adapter_that_should_have_been_merged_is_refused(copied: Path) -> None:
    shutil.rmtree(copied / "adapter")
    (copied / "adapter").mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
    (copied / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(copied / "adapter" / "adapter_model.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ModelError, match="holds LORA, which is merged before it is served"):
        open_session(opened(copied))


@pytest.mark.parametrize(("change", "shape"), [
    ({"num_virtual_tokens": 5}, (4, 128)), ({"num_layers": 1}, (4, 128)), ({"peft_type": 3}, (4, 128)), ({}, (4, 64)),
])
def test_a_prefix_of_another_shape_is_refused(
    copied: Path, change: dict[str, object], shape: tuple[int, int]
) -> None:
    shutil.rmtree(copied / "adapter")
    (copied / "adapter").mkdir()
    config = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "token_dim": 32,
              "num_layers": 2, "num_attention_heads": 1, "num_transformer_submodules": 1, "inference_mode": True}
    place, weights = (copied / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    write_safetensors(weights, {"prompt_embeddings": torch.randn(4, 128)})
    place.write_text(json.dumps(config), encoding="utf-8")
    assert open_session(opened(copied)).describe()["adapter"] == "prefix of 4"
    place.write_text(json.dumps(config | change), encoding="utf-8")
    write_safetensors(weights, {"prompt_embeddings": torch.randn(shape)})
    with pytest.raises(ModelError) as caught:
        open_session(opened(copied)).score([5, 6])
    assert "\n" not in str(caught.value)
