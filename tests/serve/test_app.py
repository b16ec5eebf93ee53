"""The endpoint as the official client sees it, and what it does under load, bad input and departing clients."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

Launch = Callable[..., Any]
TEXT = "Hello there, friend."
USER = [{"role": "user", "content": "Hi"}]
BODY = {"model": "fake", "messages": USER}
ENDLESS = {"prompt": "x", "max_tokens": 500, "stream": True}


def test_chat_answers_with_its_bill(launch: Launch) -> None:
    server = launch()
    chat = server.client().chat.completions
    raw = chat.with_raw_response.create(model="fake", messages=USER, seed=7, temperature=0.5)
    answer = raw.parse()
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len("user: Hi\n")
    assert answer.usage.completion_tokens == len(TEXT)
    assert answer.usage.total_tokens == len("user: Hi\n") + len(TEXT)
    bill = answer.usage.fivefold
    assert (bill["energy_j"], bill["energy_low"], bill["energy_high"]) == (2.0, 1.0, 3.0)
    assert bill["energy_method"] == "modelled"
    assert bill["usd"] == pytest.approx(2.0 * 0.36 / 3.6e6)
    assert 0 < bill["ttft_s"] <= bill["seconds"]
    assert bill["bytes_in"] == len(raw.http_request.content)
    assert 0 < len(raw.content) - bill["bytes_out"] < 500
    assert raw.headers["X-Fivefold-Energy-J"] == "2"
    assert float(raw.headers["X-Fivefold-Usd"]) == pytest.approx(bill["usd"])
    prompt, most, sampling = server.session.calls[0]
    assert bytes(prompt) == b"user: Hi\n"
    assert most == 512 - len(prompt)
    assert (sampling.temperature, sampling.seed, sampling.stop) == (0.5, 7, frozenset({256}))


def test_chat_streams_pieces_then_usage(launch: Launch) -> None:
    client = launch().client()
    stream = client.chat.completions.create(
        model="fake", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == TEXT
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "stop"
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(TEXT)
    assert chunks[-1].usage.fivefold["energy_j"] == 2.0


def test_pieces_arrive_while_the_engine_still_works(launch: Launch) -> None:
    stream = launch(pause=0.1).client().chat.completions.create(model="fake", messages=USER, stream=True)
    times = [time.monotonic() for c in stream if c.choices[0].delta.content]
    assert len(times) == len(TEXT)
    assert times[-1] - times[0] > 0.05 * len(TEXT)


def test_completions_take_text_tokens_and_lists(launch: Launch) -> None:
    client = launch().client()
    both = client.completions.create(model="fake", prompt=["a", "bc"], max_tokens=5)
    assert [c.text for c in both.choices] == ["Hello", "Hello"]
    assert [c.index for c in both.choices] == [0, 1]
    assert both.choices[0].finish_reason == "length"
    assert (both.usage.prompt_tokens, both.usage.completion_tokens) == (3, 10)
    assert client.completions.create(model="fake", prompt=[72, 105]).usage.prompt_tokens == 2
    assert client.completions.create(model="fake", prompt=[[72], [105]]).usage.prompt_tokens == 2
    assert client.completions.create(model="fake", prompt="x").usage.completion_tokens == 16
    pieces = list(client.completions.create(model="fake", prompt=["a", "b"], max_tokens=3, stream=True))
    for index in (0, 1):
        assert "".join(p.choices[0].text for p in pieces if p.choices[0].index == index) == "Hel"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_answer_and_are_not_sent(launch: Launch, stream: bool) -> None:
    server = launch()
    answer = server.client().completions.create(
        model="fake", prompt="x", max_tokens=20, stop=["e, f", "zz"], stream=stream
    )
    text = "".join(c.choices[0].text for c in answer) if stream else answer.choices[0].text
    assert text == "Hello ther"
    assert server.session.closed_generators == 1
    assert server.session.busy == 0


def test_models_and_health(launch: Launch) -> None:
    server = launch()
    assert [m.id for m in server.client().models.list()] == ["fake"]
    assert server.client().models.retrieve("fake").object == "model"
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("other")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_metrics_add_up(launch: Launch) -> None:
    server = launch()
    for _ in range(3):
        server.client().completions.create(model="fake", prompt="ab", max_tokens=4)
    assert server.metric("prompt_tokens_total") == 6
    assert server.metric("completion_tokens_total") == 12
    assert server.metric("joules_total") == 6
    assert server.metric('requests_total{status="200"}') >= 3


@pytest.mark.parametrize(("body", "says"), [
    ({"n": 2}, "n"), ({"logprobs": True}, "logprobs"), ({"tools": [{}]}, "tools"), ({"nonsense": 1}, "nonsense"),
    ({"temperature": -1}, "temperature"), ({"temperature": True}, "temperature"),
    ({"temperature": 1e999}, "temperature"),
    ({"top_p": 1.5}, "top_p"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 10**400}, "max_tokens"),
    ({"max_tokens": 1025}, "max_tokens"), ({"max_tokens": 2.5}, "max_tokens"), ({"seed": "x"}, "seed"),
    ({"stop": ["a"] * 5}, "stop"), ({"stop": ""}, "stop"), ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream"), ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "content"), ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"), ({"messages": "Hi"}, "messages"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "context"),
])
def test_bad_fields_are_refused_in_openais_shape(launch: Launch, body: dict[str, Any], says: str) -> None:
    text = json.dumps({**BODY, **body}).replace("Infinity", "1e999")
    answer = httpx.post(f"{launch().url}/v1/chat/completions", content=text,
                        headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"temperature": NaN}', b"[" * 100_000,
                                  b'{"a":' * 50_000, b'{"seed": ' + b"9" * 5000 + b"}"])
def test_bodies_that_are_not_json_objects_are_400(launch: Launch, text: bytes) -> None:
    answer = httpx.post(f"{launch().url}/v1/completions", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_an_overflowing_context_names_its_code(launch: Launch) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        launch().client().completions.create(model="fake", prompt="x" * 500, max_tokens=20)
    assert caught.value.code == "context_length_exceeded"


def test_other_statuses(launch: Launch) -> None:
    server = launch(max_body=1000)
    with pytest.raises(openai.NotFoundError) as caught:
        server.client().chat.completions.create(model="gpt", messages=USER)
    assert caught.value.code == "model_not_found"
    url = f"{server.url}/v1/chat/completions"
    assert httpx.post(url, content=json.dumps(BODY), headers={"Content-Type": "text/plain"}).status_code == 415
    assert httpx.post(url, json={"x": "y" * 15_000}).status_code == 413

    def chunks() -> Any:
        yield from [b"x" * 600] * 3

    assert httpx.post(url, content=chunks(), headers={"Content-Type": "application/json"}).status_code == 413
    assert httpx.get(url).status_code == 405
    assert "message" in httpx.get(f"{server.url}/nothing").json()["error"]
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"}).status_code == 403


def test_a_key_opens_and_only_a_key(launch: Launch) -> None:
    server = launch(key="s3cret")
    assert server.client("s3cret").chat.completions.create(model="fake", messages=USER).choices
    for wrong in ("s3cre", "s3cret2", "x"):
        with pytest.raises(openai.AuthenticationError):
            server.client(wrong).chat.completions.create(model="fake", messages=USER)
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/metrics", headers={b"Authorization": b"Bearer \xe9"}).status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_full_queue_is_429_with_retry_after_and_the_rest_is_served(launch: Launch) -> None:
    server = launch(pause=0.02, max_queue=2)

    def one(_: int) -> tuple[int, str | None]:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=30)
        return answer.status_code, answer.headers.get("retry-after")

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(one, range(10)))
    statuses = [status for status, _ in answers]
    assert statuses.count(200) >= 3
    assert statuses.count(429) == 10 - statuses.count(200) > 0
    assert all(int(after) >= 1 for status, after in answers if status == 429)
    assert not server.session.overlapped


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(launch: Launch, parts: Any, stream: bool) -> None:
    server = launch(pause=0.01, loop=True)
    if stream:
        with server.http().stream("POST", "/v1/completions", json=ENDLESS) as answer:
            next(answer.iter_raw())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 500}, timeout=0.5)
    assert parts.until(lambda: server.session.closed_generators == 1, 3)
    assert len(server.session.calls) == 1
    assert server.client().completions.create(model="fake", prompt="y", max_tokens=2).choices[0].text == "He"
    assert server.metric("cancelled_total") == 1


def test_a_client_that_leaves_the_queue_frees_its_place(launch: Launch, parts: Any) -> None:
    server = launch(pause=0.01, loop=True, max_queue=1)
    with server.http().stream("POST", "/v1/completions", json=ENDLESS) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "y"}, timeout=0.3)
        assert parts.until(lambda: server.app.state.worker.load() == (1, 0), 2)
    assert parts.until(lambda: server.app.state.worker.load() == (0, 0), 3)
    assert len(server.session.calls) == 1
    assert server.metric("cancelled_total") == 2


def test_a_large_body_is_refused_so_that_its_sender_can_read_it(launch: Launch) -> None:
    host, port = launch(max_body=1 << 16).url.removeprefix("http://").split(":")
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as sender:
        sender.sendall(f"{head}Content-Length: {10 << 16}\r\n\r\n".encode())
        for _ in range(10):
            sender.sendall(b"x" * (1 << 16))
            time.sleep(0.05)
        assert sender.recv(100).startswith(b"HTTP/1.1 413")


def test_a_request_that_takes_too_long_is_504_and_frees_the_engine(launch: Launch, parts: Any) -> None:
    server = launch(pause=0.02, loop=True, timeout=0.3)
    answer = server.http().post("/v1/completions", json={"prompt": "x", "max_tokens": 400})
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    assert parts.until(lambda: server.session.closed_generators == 1, 3)
    lines = server.http().post("/v1/completions", json={"prompt": "x", "max_tokens": 400, "stream": True}).text
    assert '"code":"timeout"' in lines and "[DONE]" not in lines


def test_an_engine_that_fails_is_500_once_and_serving_goes_on(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    server = launch()
    working = server.session.generate
    monkeypatch.setattr(server.session, "generate", lambda *_: iter([1, "not a token"]))
    assert server.http().post("/v1/completions", json={"prompt": "x"}).status_code == 500
    monkeypatch.setattr(server.session, "generate", working)
    assert server.http().post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_stopping_finishes_the_running_request_and_refuses_the_waiting(launch: Launch, parts: Any) -> None:
    server = launch(pause=0.03)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=BODY, timeout=20)
        assert parts.until(lambda: server.session.busy == 1)
        waiting = pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=BODY, timeout=20)
        assert parts.until(lambda: server.app.state.worker.load() == (1, 1))
        server.app.state.worker.drain()
        server.server.should_exit = True
        assert waiting.result().status_code == 503
        assert running.result().status_code == 200
        assert running.result().json()["choices"][0]["message"]["content"] == TEXT
    assert server.session.closed.wait(5)
