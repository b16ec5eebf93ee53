"""A whole run: what it learns, what it leaves untouched, what it writes, and how long it is."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import alone, asked

from fivefold.errors import DataError, StoreError
from fivefold.model import Model, load
from fivefold.testing import tiny_model
from fivefold.testing.tiny import tiny_examples
from fivefold.training.batching import Stream
from fivefold.training.checkpoint import Keeper
from fivefold.training.module import load_module, loss_of
from fivefold.training.run import Trained, _some, examples_of, run, run_key, train
from fivefold.weights import check_safetensors, read_tensors, write_safetensors

RECIPES = {"lora": "lora(rank=4, rate=0.01)", "full": "full(rate=0.003)"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_examples(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module", params=[(name, dtype) for name in RECIPES for dtype in ("float32", "bfloat16")],
                ids=lambda given: "-".join(given))
def done(
    request: Any, tiny_llama: Model, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, Trained]:
    name, dtype = request.param
    model = asked(tiny_llama, data, RECIPES[name], dtype=dtype, steps=24)
    return model, run(model, tmp_path_factory.mktemp("run"))


def mean_loss(module: Any, rows: list[Any]) -> float:
    with torch.no_grad():
        sums, counts = zip(*(alone(module, row) for row in rows), strict=True)
    return float(sum(sums)) / sum(counts)


def test_held_out_loss_falls_and_the_written_model_has_it(done: tuple[Model, Trained]) -> None:
    model, trained = done
    assert trained.fitted.after < 0.5 * trained.fitted.before and trained.fitted.steps == 24
    rows = _some(examples_of(model)[1])
    near = 1e-3 if model.train.dtype == "float32" else 0.05
    before, after = (mean_loss(load_module(load(m.path), torch.float32), rows) for m in (model, trained.model))
    assert before == pytest.approx(trained.fitted.before, rel=near)
    assert after == pytest.approx(trained.fitted.after, rel=near, abs=near)


def test_only_what_was_trained_differs_on_disk(done: tuple[Model, Trained]) -> None:
    model, trained = done
    before, after = dict(read_tensors(model.path)), dict(read_tensors(trained.model.path))
    assert before.keys() == after.keys()
    differ = {name for name in before if not np.array_equal(before[name].raw(), after[name].raw())}
    wanted = set(before) if "full" in str(model.train.methods) else {n for n in before if "proj" in n}
    assert differ == wanted
    assert all((after[n].dtype, after[n].shape) == (t.dtype, t.shape) for n, t in before.items())


def test_the_size_of_the_difference_is_that_of_real_files(done: tuple[Model, Trained]) -> None:
    model, trained = done
    files = {f.name: f.stat().st_size for f in trained.delta.iterdir()}
    lora = "lora" in str(model.train.methods)
    assert set(files) == ({"adapter_config.json", "adapter_model.safetensors"} if lora else {"full.json"})
    changed = 0 if lora else sum(t.nbytes for _, t in read_tensors(trained.model.path))
    assert trained.delta_bytes == sum(files.values()) + changed
    if lora:
        stored = check_safetensors(trained.delta / "adapter_model.safetensors")
        assert sum(math.prod(t.shape) for t in stored.values()) == trained.numbers
    else:
        assert trained.numbers == sum(p.numel() for p in load_module(model).parameters())
    said = trained.model.coverage[-1]
    assert f"{trained.numbers:,} numbers" in said and f"{trained.delta_bytes:,} bytes" in said


def test_the_model_is_served_and_knows_its_parent(done: tuple[Model, Trained]) -> None:
    from fivefold.engines import open_session

    model, trained = done
    assert trained.model.parent.path == model.path and not trained.model.train.methods
    row = examples_of(model)[1].rows[0]
    with torch.no_grad():
        logs = torch.log_softmax(load_module(load(trained.model.path), torch.float32)(
            torch.from_numpy(row.tokens)[None]).logits[0], -1).numpy()
    session = open_session(load(trained.model.path))
    try:
        scores = session.score(row.tokens.tolist())
    finally:
        session.close()
    np.testing.assert_allclose(scores, logs, atol=2e-3)


def test_the_merged_model_is_the_parent_with_its_adapter_in_peft(tiny_llama: Model, data: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    trained = run(asked(tiny_llama, data), tmp_path)
    wrapped = PeftModel.from_pretrained(load_module(tiny_llama), trained.delta).eval()
    merged = load_module(load(trained.model.path))
    tokens = torch.arange(1, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(wrapped(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-4)


def test_bfloat16_training_starts_from_the_stored_float32(tiny_llama: Model, data: Path, tmp_path: Path) -> None:
    model = asked(tiny_llama, data, "full(rate=1e-7)", dtype="bfloat16", steps=1)
    after = dict(read_tensors(run(model, tmp_path).model.path))
    for name, tensor in read_tensors(model.path):
        assert np.abs(tensor.numpy() - after[name].numpy()).max() <= 2e-7


def test_steps_follow_from_rounds_over_the_data(tiny_llama: Model, data: Path, tmp_path: Path) -> None:
    for epochs in (0.01, 1.0, 2.3):
        told = []
        model = asked(tiny_llama, data, steps=0, epochs=epochs)
        trained = run(model, tmp_path / str(epochs), planned=told.append)
        part = examples_of(model)[0]
        per_round = len(Stream(part.rows, 512, 1024).epoch(0))
        assert trained.fitted.steps == told[0].steps == max(1, math.ceil(epochs * per_round))
    assert per_round > 2


def test_seconds_limit_the_steps(
    tiny_llama: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fivefold.training.run._seconds_per_step", lambda *given: 0.5)
    long = asked(tiny_llama, data, steps=0, epochs=100.0, seconds=3.2)
    assert run(long, tmp_path / "one").fitted.steps == 6
    monkeypatch.setattr("fivefold.training.run._seconds_per_step", lambda *given: 100.0)
    assert run(long, tmp_path / "two").fitted.steps == 1
    short = asked(tiny_llama, data, steps=0, epochs=0.01, seconds=1000.0)
    assert run(short, tmp_path / "three").fitted.steps == 1


def test_a_pilot_changes_nothing(tiny_llama: Model, data: Path, tmp_path: Path) -> None:
    timed = run(asked(tiny_llama, data, steps=0, epochs=1.0, seconds=1000.0), tmp_path / "one")
    plain = run(asked(tiny_llama, data, steps=timed.fitted.steps), tmp_path / "two")
    assert timed.fitted.losses == plain.fitted.losses


def test_a_resumed_run_keeps_the_steps_it_began_with(
    tiny_llama: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fivefold.training.run._seconds_per_step", lambda *given: 0.5)
    model = asked(tiny_llama, data, steps=0, epochs=100.0, seconds=4.2)
    heard = []

    def interrupt(step: Any) -> None:
        heard.append(step.loss)
        if step.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, keeper=Keeper(tmp_path, run_key(model), 0.0), listen=interrupt)
    monkeypatch.setattr("fivefold.training.run._seconds_per_step", lambda *given: 0.001)
    again = run(model, tmp_path, keeper=Keeper(tmp_path, run_key(model), 0.0))
    assert again.fitted.steps == 8 and list(again.fitted.losses[:3]) == heard[:3]


def test_what_a_killed_process_wrote_at_its_end_is_written_again(tiny_llama: Model, data: Path, tmp_path: Path) -> None:
    model = asked(tiny_llama, data)
    keeper = Keeper(tmp_path, run_key(model))
    first = run(model, tmp_path, keeper=keeper)
    weights = (first.model.path / "model.safetensors").read_bytes()
    shutil.rmtree(first.delta)
    again = run(model, tmp_path, keeper=Keeper(tmp_path, run_key(model)))
    assert (again.model.path / "model.safetensors").read_bytes() == weights and again.delta_bytes == first.delta_bytes
    with pytest.raises(StoreError, match="not empty"):
        run(model, tmp_path)


def test_the_key_of_a_run(tiny_llama: Model, data: Path, tmp_path: Path) -> None:
    model = asked(tiny_llama, data)
    key = run_key(model)
    copy = shutil.copy(data, tmp_path / "elsewhere.jsonl")
    assert run_key(asked(tiny_llama, Path(copy))) == key
    other = tiny_examples(tmp_path / "other.jsonl", 32)
    changed = [asked(tiny_llama, other), asked(tiny_llama, data, "lora(rank=8, rate=0.01)"),
               asked(tiny_llama, data, seed=1),
               asked(tiny_model(tmp_path / "another", layers=2, vocab=257, context=256, seed=1), data)]
    assert len({key, *map(run_key, changed)}) == 5


def test_windows_shorter_than_an_example_are_not_packed_over(data: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", layers=2, vocab=257)
    config = json.loads((model.path / "config.json").read_text())
    sizes = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    (model.path / "config.json").write_text(json.dumps({**config, **sizes}))
    model = asked(load(model.path), data, steps=4)
    trained = run(model, tmp_path / "out")
    rows = _some(examples_of(model)[1])
    assert mean_loss(load_module(load(model.path)), rows) == pytest.approx(trained.fitted.before, rel=1e-4)


def test_training_needs_examples(tiny_llama: Model) -> None:
    with pytest.raises(DataError, match="no examples"):
        examples_of(tiny_llama)


def test_a_recipe_trains_in_its_scratch_folder(tiny_llama: Model, data: Path, tmp_path: Path) -> None:
    done = train(asked(tiny_llama, data, steps=2).but(work=tmp_path / "work"))
    assert done.path == tmp_path / "work" / "trained" and done.train.data is None
    assert train(replace(asked(tiny_llama, data, steps=2))).path.is_dir()


def test_half_precision_files_stay_half(tmp_path: Path, data: Path) -> None:
    model = tiny_model(tmp_path / "model", layers=2, vocab=257)
    halves = {name: torch.from_numpy(t.numpy()).half() for name, t in read_tensors(model.path)}
    write_safetensors(model.path / "model.safetensors", halves)
    trained = run(asked(model, data, RECIPES["full"], steps=12), tmp_path / "out")
    assert {t.dtype for _, t in read_tensors(trained.model.path)} == {"F16"}
    assert trained.delta_bytes < 2.1 * trained.numbers
    loss = loss_of(load_module(load(trained.model.path)))
    held = Stream(_some(examples_of(asked(model, data))[1]), 512, 1024).batches()
    with torch.no_grad():
        total = sum(float(loss(b)) * b.learned for b in held) / sum(b.learned for b in held)
    assert total == pytest.approx(trained.fitted.after, abs=0.02)
