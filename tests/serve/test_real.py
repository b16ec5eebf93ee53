"""The bundled model in llama.cpp behind the endpoint: the same answer as the engine alone, in text and in tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("xllamacpp")

import openai
import uvicorn

from fivefold.engines import Sampling, open_session
from fivefold.errors import FivefoldError
from fivefold.machine import Machine
from fivefold.meters.money import Prices
from fivefold.model import Model, load
from fivefold.serve.app import create_app
from fivefold.serve.ledger import Ledger
from fivefold.serve.server import bind
from fivefold.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


@pytest.fixture(scope="module")
def model() -> Model:
    try:
        found = load("smollm2-135m-published")
    except FivefoldError as error:
        pytest.skip(f"the bundled model cannot be had here: {error}")
    return found.but(run=replace(found.run, threads=1))


@pytest.fixture(scope="module")
def client(model: Model, until: Any) -> Iterator[openai.OpenAI]:
    app = create_app(model, session_factory=lambda: open_session(model), texts=Tokenizer(model.tokenizer_file),
                     ledger=Ledger(Machine.probe(), Prices.load()))
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert until(lambda: server.started, 60)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
    server.should_exit = True
    thread.join(20)


def test_the_answer_is_the_engines_own(model: Model, client: openai.OpenAI) -> None:
    tokenizer = Tokenizer(model.tokenizer_file)
    prompt = tokenizer.chat(QUESTION)
    session = open_session(model)
    tokens = list(session.generate(prompt, 12, Sampling(stop=tokenizer.stop)))
    session.close()
    ask: dict[str, Any] = {"model": model.name, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].message.content == tokenizer.decode(tokens)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == tokenizer.decode(tokens)
    assert whole.usage.prompt_tokens == len(prompt)
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens == len(tokens)


def test_the_bill_is_real(client: openai.OpenAI, model: Model) -> None:
    def bill(tokens: int) -> dict[str, Any]:
        ask: dict[str, Any] = {"model": model.name, "prompt": "Once upon a time", "max_tokens": tokens}
        return dict(client.completions.create(**ask, temperature=0).usage.fivefold)

    short, long = bill(2), bill(40)
    for one in (short, long):
        assert one["energy_method"] in ("measured", "modelled")
        assert 0 < one["ttft_s"] <= one["seconds"]
        assert one["usd"] > 0
        if one["energy_method"] == "modelled":
            assert one["energy_low"] < one["energy_j"] < one["energy_high"] and one["energy_note"]
    assert long["energy_j"] > short["energy_j"] > 0


def test_seeds_repeat(client: openai.OpenAI, model: Model) -> None:
    def text(seed: int) -> str:
        ask: dict[str, Any] = {"model": model.name, "prompt": "My favourite colour", "max_tokens": 12}
        return str(client.completions.create(**ask, temperature=1.0, seed=seed).choices[0].text)

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1
