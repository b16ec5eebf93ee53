"""What a training process holds besides its numbers: rehearsed once, remembered, and close to what is then measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tuning import machine

from fivefold.artifact import Artifact
from fivefold.errors import Crashed
from fivefold.study import resident
from fivefold.study.resident import Added, added
from fivefold.testing.contract import sentence
from fivefold.testing.tiny import tiny_examples, write_tokenizer
from fivefold.training.memory import Needs

PARAMETERS = 47_690_240


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_rehearsal_is_run_once_and_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = added("full", machine(), said.append)
    assert len(said) == 1 and "rehearsing full" in said[0]
    assert 2e7 < first.entered < first.peak < 1e9
    monkeypatch.setattr(resident, "_child", lambda *given: pytest.fail("it was rehearsed again"))
    assert added("full", machine(), said.append) == first and len(said) == 1


def test_it_is_made_again_for_other_code_and_when_its_note_is_damaged(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def child(what: str, folder: str, recipe: str) -> str:
        made.append((what, recipe))
        return json.dumps({"entered": 1.0, "peak": 2.0})

    monkeypatch.setattr(resident, "_child", child)
    assert added("lora", machine()) == Added(1.0, 2.0) and added("lora", machine()) == Added(1.0, 2.0)
    assert made == [("make", "lora"), ("rehearse", "lora")]
    monkeypatch.setattr(resident, "shared_code", lambda: "other code")
    added("lora", machine())
    assert len(made) == 4
    for note in (cache / "rehearsals").iterdir():
        note.write_text("{")
    added("lora", machine())
    assert len(made) == 6


def test_one_that_fails_is_a_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "__name__", "fivefold.study.no_such_module")
    with pytest.raises(Crashed, match=r"rehearsal of full failed .*no_such_module") as caught:
        added("full", machine())
    sentence(caught.value)
    monkeypatch.setattr(resident, "SECONDS", 0.01)
    with pytest.raises(Crashed, match="took more than 0 s") as caught:
        added("full", machine())
    sentence(caught.value)
    assert not (cache / "rehearsals").exists()


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose numbers take about as much memory as the libraries."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("middling") / "model"
    folder.mkdir()
    write_tokenizer(folder, 320)
    config = LlamaConfig(
        vocab_size=24_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in module.parameters()) == PARAMETERS
    module.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", ["full", "lora", "qlora"])
def test_the_forecast_is_within_15_percent_of_the_measured_peak(
    middling: Path, tmp_path: Path, recipe: str
) -> None:
    rows = tiny_examples(tmp_path / "rows.jsonl", 120)
    command = [sys.executable, "-m", "fivefold", "train", str(middling), "--data", str(rows), "--out",
               str(tmp_path / "out"), "--recipe", recipe, "--steps", "3", "--tokens-per-step", "512", "--items", "2"]
    subprocess.run(command, capture_output=True, timeout=500, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    forecast = Needs(**json.loads((tmp_path / "out" / "run.json").read_text())["chosen"]["needs"]).peak
    measured = Artifact.open(tmp_path / "out" / "model").facts["made"]["memory"]["value"]
    assert forecast == pytest.approx(measured, rel=0.15) and measured > 10 * PARAMETERS
