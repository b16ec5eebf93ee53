"""Prefix tuning: a real prompt in front, and peft's own model around transformers', are the oracles."""

from pathlib import Path

import numpy as np
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

from fivefold.engines import open_session
from fivefold.errors import DataError, Misfit
from fivefold.model import Trait, load
from fivefold.recipe import Recipe
from fivefold.training.batching import packed
from fivefold.training.module import loss_of
from fivefold.training.run import examples_of

FAMILIES = ("llama", "qwen2", "gpt2")
WORDS = list(range(60, 72))


def begun(desk: Desk) -> Desk:
    """With the start of the examples as its prefix."""
    rows = examples_of(desk.model)[0].rows[:4]
    desk.adaptation.ready(desk.lesson, lambda batch: torch.zeros(()), lambda step: [(packed([rows], 256), 1.0)])
    return desk


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_as_a_prompt_of_the_examples_first_words(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    desk = begun(Desk.of(pupil(tmp_path, family), "prefix(tokens=12)"))
    words = examples_of(desk.model)[0].rows[0].tokens[:12].tolist()
    text = torch.cat([torch.tensor([words, words]), IDS], 1)
    module = AutoModelForCausalLM.from_pretrained(desk.model.path, dtype=torch.float32).eval()
    with torch.no_grad():
        want = module(text).logits[:, 12:]
    torch.testing.assert_close(desk.logits(), want, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", ["text", "random"])
def test_it_trains_only_what_the_formula_counts(family: str, start: str, tmp_path: Path) -> None:
    desk = begun(Desk.of(pupil(tmp_path, family), f'prefix(tokens=8, start="{start}")'))
    formula_is_what_is_allocated(desk)
    only_the_adapter_learns(desk)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_examples_have_the_loss_and_the_gradient_they_have_alone(family: str, tmp_path: Path) -> None:
    desk = begun(Desk.of(pupil(tmp_path, family), "prefix(tokens=8)"))
    desk.lesson.module.eval()
    rows, loss = examples_of(desk.model)[0].rows[:3], loss_of(desk.lesson.module, desk.adaptation.hidden(desk.lesson))
    (weight,) = desk.lesson.trained.values()

    def gradient(batches: list) -> tuple[float, torch.Tensor]:
        weight.grad = None
        total = sum(batch.learned for batch in batches)
        value = sum(loss(batch) * batch.learned / total for batch in batches)
        value.backward()
        return float(value), weight.grad.clone()

    together = gradient([packed([rows], 128)])
    apart = gradient([packed([[row]], 64) for row in rows])
    assert together[0] == pytest.approx(apart[0], abs=1e-5)
    torch.testing.assert_close(together[1], apart[1], atol=1e-5, rtol=1e-3)
    assert float(together[1].abs().max()) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_by_peft_it_is_the_model_that_was_trained(family: str, tmp_path: Path) -> None:
    desk = begun(Desk.of(pupil(tmp_path, family), "prefix(tokens=8)")).disturbed(0.3)
    model = beside(desk, tmp_path / "run")
    by_peft = reference(desk.model.path, model.path / "adapter")
    torch.testing.assert_close(by_peft, desk.logits(), atol=5e-5, rtol=1e-4)
    assert (by_peft - reference(desk.model.path)).abs().max() > 0.05
    (held,) = load_file(model.path / "adapter" / "adapter_model.safetensors").values()
    assert held.shape == (8, 2 * 2 * model.blueprint.kv_heads * model.blueprint.head_dim)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_served_as_it_was_trained(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fivefold.engines import torch_

    monkeypatch.setattr(torch_, "SCORED", 10)
    desk = begun(Desk.of(pupil(tmp_path, family), "prefix(tokens=8)")).disturbed(0.3)
    model = served_alike(desk, tmp_path)
    session = open_session(model)
    told = session.describe()
    plain = open_session(load(desk.model.path)).describe()
    assert told["adapter"] == "prefix of 8" and told["weight_bytes"] - plain["weight_bytes"] == 4 * 8 * 4 * (
        model.blueprint.kv_heads * model.blueprint.head_dim
    )
    assert model.blueprint.context == 256 - 8
    with pytest.raises(DataError, match="do not fit the context of 248"):
        session.score([5] * 249)
    assert session.score([5] * 248).shape == (248, session.vocab)


def test_a_text_in_two_pieces_scores_as_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fivefold.engines import torch_

    desk = begun(Desk.of(pupil(tmp_path), "prefix(tokens=8)")).disturbed(0.3)
    session = open_session(beside(desk, tmp_path / "run"))
    whole = session.score(IDS[0].tolist())
    monkeypatch.setattr(torch_, "SCORED", 7)
    np.testing.assert_allclose(session.score(IDS[0].tolist()), whole, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls(dtype: str, tmp_path: Path) -> None:
    done = learned(pupil(tmp_path, dtype=dtype, steps=40), "prefix(tokens=8, rate=0.05)", tmp_path / "run", to=0.9)
    assert 4 * done.numbers < done.delta_bytes < 4 * done.numbers + 4096 and done.beside
    assert Trait.PLAIN_GRAPH not in load(done.model.path).traits


def test_rows_too_long_for_what_the_prefix_leaves_are_refused(tmp_path: Path) -> None:
    model = pupil(tmp_path)
    with pytest.raises(Misfit, match="leaves nothing of a context of 256; set tokens lower"):
        Recipe.parse("prefix(tokens=256)").plan(model)
    assert Recipe.parse("prefix(tokens=240)").plan(model).blueprint.context == 16
    desk = Desk.of(model, "prefix(tokens=240)")
    with pytest.raises(DataError, match="a row of 24 tokens behind a prefix of 240 does not fit the context of 256"):
        desk.logits()


def test_a_family_with_more_than_a_head_is_refused(tmp_path: Path) -> None:
    desk = Desk.of(pupil(tmp_path), "prefix")
    desk.lesson.module.config.logit_scale = 0.5
    with pytest.raises(Misfit, match="whose logits are more than a product with the head; use lora there"):
        desk.adaptation.prepare(desk.lesson)


def test_weights_cannot_be_rewritten_after_it() -> None:
    with pytest.raises(Misfit, match=r"^gguf\(type=\"q8_0\"\) needs no adapter beside the weights, which prefix takes"):
        Recipe.parse('prefix + gguf(type="q8_0")')


def test_memory_for_activations(tmp_path: Path) -> None:
    keeps_what_the_formula_says(tmp_path, "prefix(tokens=8)")
    same_when_layers_are_run_again(pupil(tmp_path), "prefix(tokens=8)")
