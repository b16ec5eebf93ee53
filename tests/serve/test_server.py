"""Starting and stopping as a process: exposure, ports, signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fivefold.errors import UserError
from fivefold.serve.server import bind, check_exposure

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest
from fivefold.serve.app import create_app
from fivefold.serve.server import bind, run
session = conftest.FakeSession(pause=float(sys.argv[2]))
def opened():
    if sys.argv[3] == "broken":
        from fivefold.errors import ModelError
        raise ModelError("this model is broken; get another")
    return session
app = create_app(conftest.model(), session_factory=opened, texts=conftest.AsciiTexts(), ledger=conftest.ledger())
run(app, bind("127.0.0.1", 0), grace=float(sys.argv[4]), ready=lambda address: print(address, flush=True))
print("closed" if session.closed.is_set() else "left open", flush=True)
"""


def start(pause: float, kind: str = "whole", grace: float = 10) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(pause), kind, str(grace)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    mine: list[subprocess.Popen[str]] = []
    yield mine
    for process in mine:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_request_finish(processes: list[subprocess.Popen[str]], sig: signal.Signals) -> None:
    process = start(0.05)
    processes.append(process)
    assert process.stdout
    url = process.stdout.readline().strip()
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 20}, timeout=20))

    thread = threading.Thread(target=ask)
    thread.start()
    while "fivefold_running 1" not in httpx.get(f"{url}/metrics").text:
        time.sleep(0.01)
    process.send_signal(sig)
    thread.join(20)
    assert answers[0].status_code == 200
    assert answers[0].json()["choices"][0]["text"] == "Hello there, friend."
    assert process.wait(10) == 0
    assert process.stdout.readline().strip() == "closed"


def test_grace_ends(processes: list[subprocess.Popen[str]]) -> None:
    process = start(1.0, grace=1)
    processes.append(process)
    assert process.stdout
    url = process.stdout.readline().strip()
    with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "x", "stream": True}, timeout=20) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.RemoteProtocolError):
            list(pieces)
    assert process.wait(10) == 0


def test_a_model_that_does_not_open_is_its_own_error(processes: list[subprocess.Popen[str]]) -> None:
    process = start(0, "broken")
    processes.append(process)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err.strip().splitlines()[-1].endswith("ModelError: this model is broken; get another")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_loopback_needs_no_key(host: str) -> None:
    check_exposure(host, None)


@pytest.mark.parametrize(("host", "key"), [("0.0.0.0", None), ("192.168.1.2", None), ("example.org", None),
                                           ("::", None), ("127.0.0.1", " ")])
def test_other_addresses_need_a_key(host: str, key: str | None) -> None:
    with pytest.raises(UserError, match="key"):
        check_exposure(host, key)
    check_exposure(host, "s3cret")


def test_a_taken_port_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another --port"):
            bind("127.0.0.1", taken.getsockname()[1])
