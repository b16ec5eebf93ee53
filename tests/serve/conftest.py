"""A server on a free loopback port around a session that says what it is told to, at a given pace."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")

import httpx
import openai
import uvicorn

from fivefold.engines import Sampling
from fivefold.machine import Machine
from fivefold.meters.money import Prices
from fivefold.model import Blueprint, Model
from fivefold.quantity import Quantity
from fivefold.serve.app import Limits, create_app
from fivefold.serve.ledger import Ledger
from fivefold.serve.server import bind

VOCAB = 300
END = 256


class AsciiTexts:
    """One token per byte; token 256 ends an answer."""

    stop = frozenset({END})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages))

    def stream(self) -> AsciiTexts:
        return self

    def feed(self, token: int) -> str:
        return chr(token) if token < 128 else "\ufffd"

    def flush(self) -> str:
        return ""


class FakeSession:
    """Yields `answer` (bytes, repeated for ever when `loop`), `pause` seconds apart."""

    vocab = VOCAB

    def __init__(self, answer: str = "Hello there, friend.", pause: float = 0.0, loop: bool = False) -> None:
        self.answer, self.pause, self.loop = answer, pause, loop
        self.calls: list[tuple[list[int], int, Sampling]] = []
        self.closed_generators = 0
        self.busy = 0
        self.overlapped = False
        self.closed = threading.Event()

    def generate(self, prompt: Sequence[int], max_tokens: int, sampling: Sampling) -> Iterator[int]:
        self.calls.append((list(prompt), max_tokens, sampling))
        self.busy += 1
        self.overlapped |= self.busy > 1
        try:
            text = self.answer * (max_tokens if self.loop else 1)
            for token in text.encode()[:max_tokens]:
                time.sleep(self.pause)
                yield token
        except GeneratorExit:
            self.closed_generators += 1
            raise
        finally:
            self.busy -= 1

    def score(self, tokens: Sequence[int]) -> Any:
        raise NotImplementedError

    def generate_batch(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        return {"engine": "fake"}

    def close(self) -> None:
        self.closed.set()


class FixedWindow:
    """Two joules, modelled, for every request."""

    def __init__(self) -> None:
        self.energy = Quantity.missing("J", "open")
        self.seconds = 0.0

    def __enter__(self) -> FixedWindow:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        self.seconds = time.perf_counter() - self._start
        self.energy = Quantity(value=2.0, unit="J", method="modelled", low=1.0, high=3.0, reason="fixed for a test")


class FixedLedger(Ledger):
    def open(self) -> FixedWindow:
        return FixedWindow()


def ledger() -> FixedLedger:
    machine = Machine(id="0", cpu="test", code="test", cores=2, isa=(), ram=1 << 30, gpus=(), os="test")
    prices = Prices(electricity_usd_per_kwh=0.36, core_hour_usd=0.0, gpu_hour_usd=0.0, egress_usd_per_gb=0.0,
                    date="2026-01-01")
    return FixedLedger(machine, prices)


def model(name: str = "fake") -> Model:
    blueprint = Blueprint(family="llama", layers=1, width=8, heads=1, kv_heads=1, head_dim=8, ffn=8, vocab=VOCAB,
                          context=512, tied=True)
    return Model(name=name, path=Path("nowhere"), format="gguf", blueprint=blueprint)


@dataclass
class Running:
    """A server in a thread of this process, on a free loopback port."""

    url: str
    session: FakeSession
    server: uvicorn.Server
    app: Any

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20)

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"fivefold_{name} "))


def until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(scope="session", name="until")
def until_fixture() -> Callable[..., bool]:
    return until


@pytest.fixture
def parts() -> Any:
    """What an app is made of, for tests that make their own."""
    return SimpleNamespace(model=model, texts=AsciiTexts, ledger=ledger, Session=FakeSession, until=until)


@pytest.fixture
def launch() -> Iterator[Callable[..., Running]]:
    started: list[tuple[uvicorn.Server, threading.Thread]] = []

    def go(
        answer: str = "Hello there, friend.", pause: float = 0.0, loop: bool = False, key: str | None = None,
        **limits: Any,
    ) -> Running:
        session = FakeSession(answer, pause, loop)
        app = create_app(model(), session_factory=lambda: session, texts=AsciiTexts(), ledger=ledger(), key=key,
                         limits=Limits(**limits), hosts=None if key else ("127.0.0.1", "localhost"))
        listener = bind("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        assert until(lambda: server.started)
        started.append((server, thread))
        return Running(f"http://127.0.0.1:{listener.getsockname()[1]}", session, server, app)

    yield go
    for server, thread in started:
        server.should_exit = True
        thread.join(10)
