"""Houlsby's adapters: the definition written out is the oracle, and the torch engine serves what was trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import (
    IDS,
    Desk,
    beside,
    formula_is_what_is_allocated,
    keeps_what_the_formula_says,
    learned,
    only_the_adapter_learns,
    pupil,
    reference,
    same_when_layers_are_run_again,
    served_alike,
)
from safetensors.torch import load_file
from torch.nn import functional as F

from fivefold.engines import open_session
from fivefold.errors import Misfit, ModelError
from fivefold.model import Trait, load
from fivefold.recipe import Recipe

FAMILIES = ("llama", "qwen2", "gpt2")


@torch.no_grad()
def written_out(folder: Path, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of transformers' own model, with z + gelu(z D' + d) U' + u put behind the last matrix of every block."""
    from transformers import AutoModelForCausalLM

    module: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for i, layer in enumerate(getattr(module.base_model, "layers", getattr(module.base_model, "h", None))):
        attention = layer.self_attn.o_proj if hasattr(layer, "self_attn") else layer.attn.c_proj
        ffn = layer.mlp.down_proj if hasattr(layer.mlp, "down_proj") else layer.mlp.c_proj
        for place, last in (("attention", attention), ("ffn", ffn)):
            down, d, up, u = (tensors[f"{i}.{place}.{n}"] for n in ("down", "down_bias", "up", "up_bias"))
            last.register_forward_hook(
                lambda _, __, z, down=down, d=d, up=up, u=u: z + F.gelu(z @ down.T + d) @ up.T + u
            )
    return module(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_nearly_as_the_parent_and_trains_only_what_the_formula_counts(family: str, tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path, family), "houlsby(size=8)")
    parent = reference(desk.model.path)
    assert (desk.logits() - parent).abs().max() < 0.01 * parent.std()
    for name, p in desk.lesson.trained.items():
        if name.endswith("bias"):
            assert not p.any()
        else:
            assert 0.005 < float(p.detach().std()) < 0.011 and float(p.detach().abs().max()) <= 0.02
    formula_is_what_is_allocated(desk)
    only_the_adapter_learns(desk)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_definition_says(family: str, tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path, family), "houlsby(size=8)").disturbed(0.2)
    model = beside(desk, tmp_path / "run")
    tensors = load_file(model.path / "adapter" / "bottleneck.safetensors")
    assert {k: v.shape for k, v in tensors.items()} == {
        k: torch.Size(v) for k, v in desk.adaptation.shapes(model.blueprint).items()
    }
    torch.testing.assert_close(desk.logits(), written_out(desk.model.path, tensors), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_served_as_it_was_trained(family: str, tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path, family), "houlsby(size=8)").disturbed(0.2)
    assert (desk.logits() - reference(desk.model.path)).abs().max() > 0.05
    model = served_alike(desk, tmp_path)
    assert open_session(model).describe()["adapter"] == "bottleneck of 8"
    torch.testing.assert_close(reference(model.path), reference(desk.model.path))


def test_in_bfloat16_it_is_served_close_by(tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path), "houlsby(size=8)").disturbed(0.2)
    model = beside(desk, tmp_path / "run")
    want = desk.logits()[0].softmax(-1)
    session = open_session(model.but(run=replace(model.run, dtype="bfloat16")))
    assert (torch.from_numpy(session.score(IDS[0].tolist())).exp() - want).abs().max() < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls(dtype: str, tmp_path: Path) -> None:
    done = learned(pupil(tmp_path, dtype=dtype, steps=30), "houlsby(size=16, rate=0.01)", tmp_path / "run")
    assert 4 * done.numbers < done.delta_bytes < 4 * done.numbers + 8192 and done.beside
    again = load(done.model.path)
    assert Trait.PLAIN_GRAPH not in again.traits
    with pytest.raises(Misfit, match="has an adapter beside its weights; train the model that it was learned on"):
        Recipe.parse("lora").plan(again.but(train=pupil(tmp_path / "b").train, traits=frozenset(Trait)))


@pytest.mark.parametrize("after", [
    'gguf(type="q8_0")', "mixed_precision", "int8", "int4", "wanda", "prune_depth(layers=1)", "repair",
])
def test_what_rewrites_weights_is_refused_after_it(after: str) -> None:
    with pytest.raises(Misfit, match=r"needs no adapter beside the weights, which houlsby takes away; remove houlsby$"):
        Recipe.parse(f"houlsby + {after}")


@pytest.mark.parametrize("engine", ["llama.cpp", "openvino", "openvino+llama.cpp"])
def test_other_engines_are_refused(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(Misfit, match=r'reads no adapter beside the weights; choose engine\(type="torch"\)'):
        Recipe.parse(f'houlsby + engine(type="{engine}")').plan(pupil(tmp_path))
    assert Recipe.parse('houlsby + engine(type="torch")').plan(pupil(tmp_path / "b"))


def test_a_family_whose_blocks_are_not_known_is_refused(tmp_path: Path) -> None:
    from fivefold.engines._bottleneck import install

    desk = Desk.of(pupil(tmp_path), "lora")
    for layer in desk.lesson.module.model.layers:
        layer.strange, layer.mlp = layer.mlp, None
        del layer.mlp
    with pytest.raises(ModelError, match="llama has no block known as ffn; use lora there"):
        install(desk.lesson.module, 4)


def test_memory_for_activations(tmp_path: Path) -> None:
    keeps_what_the_formula_says(tmp_path, "houlsby(size=8)")
    same_when_layers_are_run_again(pupil(tmp_path), "houlsby(size=8)")
