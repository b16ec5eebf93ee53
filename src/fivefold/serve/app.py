"""The endpoint: routes, keys, limits, and answers whole or streamed (server-sent events), in OpenAI's shapes.

    GET  /health  /metrics  /v1/models  /v1/models/{name}
    POST /v1/chat/completions  /v1/completions

Without a key only loopback names are accepted in `Host`, and bodies must be JSON by content type: together that keeps
web pages, which can reach a local port, from using the model.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from fivefold.engines import Sampling, Session, default_engine
from fivefold.errors import DataError, ModelError
from fivefold.model import Model
from fivefold.serve import ledger as books
from fivefold.serve.answer import Streamed, Whole, event_queue
from fivefold.serve.ledger import Ledger
from fivefold.serve.wire import Ask, Kind, Prompt, Refusal, dumps, parse
from fivefold.serve.worker import Decoder, Job, Worker

EVERY = 0.03
"""A stream sends at most once in so many seconds."""
DISCARDED = 16
"""How many times `max_body` is read of a body that is refused anyway."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Texts(Protocol):
    """What is needed of `tokenizer.Tokenizer`."""

    stop: frozenset[int]

    def encode(self, text: str) -> list[int]: ...

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]: ...

    def stream(self) -> Decoder: ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """`max_tokens` per answer, `max_body` bytes, `max_queue` waiting requests, `timeout` seconds per request."""

    max_queue: int = 16
    max_tokens: int = 1024
    max_body: int = 1 << 20
    timeout: float = 600.0
    upload: float = 30.0


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


class Desk:
    """Turns a checked request into a job: names, tokens and limits. `context` is in tokens."""

    def __init__(self, model: Model, texts: Texts, limits: Limits, vocab: int) -> None:
        self.model, self.texts, self.limits, self.vocab = model, texts, limits, vocab
        self.context = min(model.run.context, model.blueprint.context)
        self.created = int(time.time())

    def describe(self) -> dict[str, Any]:
        return {
            "id": self.model.name, "object": "model", "created": self.created, "owned_by": "fivefold",
            "fivefold": {"engine": default_engine(self.model), "context": self.context,
                         "max_tokens": self.limits.max_tokens, "coverage": list(self.model.coverage)},
        }

    def check_name(self, name: str | None) -> None:
        if name is not None and name != self.model.name:
            raise Refusal(404, f"this server has the model {self.model.name!r} only; ask for that", param="model",
                          code="model_not_found")

    def tokens(self, prompt: Prompt) -> list[int]:
        try:
            if isinstance(prompt, str):
                return self.texts.encode(prompt)
            if isinstance(prompt[0], dict):
                return self.texts.chat(prompt)
        except (DataError, ModelError) as error:
            raise Refusal(400, str(error), param="messages") from None
        return list(prompt)

    def job(self, ask: Ask, emit: Callable[[Any], None]) -> Job:
        """Blocking (it tokenizes). Raises Refusal when a limit is passed."""
        prompts = [self.tokens(p) for p in ask.prompts]
        longest = max(map(len, prompts))
        if min(map(len, prompts)) == 0:
            raise Refusal(400, "a prompt has no tokens; write at least one character", param="prompt")
        if ask.max_tokens is not None and ask.max_tokens > self.limits.max_tokens:
            raise Refusal(400, f"this server answers with at most {self.limits.max_tokens} tokens; lower max_tokens",
                          param="max_tokens")
        room = self.context - longest
        wanted = ask.max_tokens if ask.max_tokens is not None else max(1, min(room, self.limits.max_tokens))
        if wanted > room:
            raise Refusal(
                400, f"the context is {self.context} tokens, and the prompt has {longest} with {wanted} asked for;"
                " shorten the prompt or lower max_tokens", param="messages" if ask.kind == "chat" else "prompt",
                code="context_length_exceeded",
            )
        seed = secrets.randbits(31) if ask.seed is None else ask.seed & (2**63 - 1)
        sampling = Sampling(temperature=ask.temperature, top_p=ask.top_p, seed=seed, stop=self.texts.stop)
        return Job(prompts=prompts, max_tokens=wanted, sampling=sampling, stops=ask.stop, emit=emit,
                   every=EVERY if ask.stream else math.inf)


def create_app(
    model: Model, *, session_factory: Callable[[], Session], texts: Texts, ledger: Ledger, limits: Limits = Limits(),
    key: str | None = None, hosts: Sequence[str] | None = None,
) -> FastAPI:
    """The application, with its worker in `app.state.worker`, started and closed by the app's lifespan.

    `hosts`: names accepted in the Host header (None: any). The session is opened in the worker's thread.
    """
    worker = Worker(session_factory, texts.stream, ledger, max_queue=limits.max_queue)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        session = await asyncio.to_thread(worker.start)
        app.state.desk = Desk(model, texts, limits, session.vocab)
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPI(title="Fivefold", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.worker = worker
    app.state.ledger = ledger
    _handle_errors(app, ledger)
    gate = [Depends(_gate(key, hosts))]
    numbers = itertools.count(1)

    @app.get("/health", response_class=Json)
    async def health() -> Json:
        stopping = worker.draining
        return Json({"status": "stopping" if stopping else "ok"}, status_code=503 if stopping else 200)

    @app.get("/metrics", dependencies=gate)
    async def metrics() -> Response:
        running, waiting = worker.load()
        return Response(books.exposition(ledger.totals(), running, waiting), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=gate)
    async def models(request: Request) -> Json:
        return Json({"object": "list", "data": [request.app.state.desk.describe()]})

    @app.get("/v1/models/{name:path}", dependencies=gate)
    async def one_model(name: str, request: Request) -> Json:
        request.app.state.desk.check_name(name)
        return Json(request.app.state.desk.describe())

    @app.post("/v1/chat/completions", dependencies=gate)
    async def chat(request: Request) -> Response:
        return await _answer(request, "chat", f"chatcmpl-{next(numbers)}-{secrets.token_hex(6)}")

    @app.post("/v1/completions", dependencies=gate)
    async def completions(request: Request) -> Response:
        return await _answer(request, "text", f"cmpl-{next(numbers)}-{secrets.token_hex(6)}")

    return app


async def _answer(request: Request, kind: Kind, number: str) -> Response:
    state = request.app.state
    desk: Desk = state.desk
    body = await _body(request, desk.limits)
    ask = parse(body, kind, desk.vocab)
    desk.check_name(ask.model)
    events, emit = event_queue()
    job = await asyncio.to_thread(desk.job, ask, emit)
    try:
        state.worker.submit(job)
    except Refusal:
        state.ledger.add("rejected")
        raise
    form = Streamed if ask.stream else Whole
    return form(ask, number, desk.model.name, job, events, state.worker, state.ledger, len(body), desk.limits.timeout)


async def _body(request: Request, limits: Limits) -> bytes:
    """At most `max_body` bytes of JSON, within `upload` seconds.

    A body that is too large is read on and thrown away for a while: a client that is still sending when the connection
    closes would see a reset instead of the answer.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "send the body with Content-Type: application/json")
    close = {"Connection": "close"}
    large = Refusal(413, f"the body is larger than {limits.max_body} bytes; shorten it", headers=close)
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(limits.upload):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limits.max_body:
                    body += chunk
                elif size > DISCARDED * limits.max_body:
                    break
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {limits.upload:g} s; send it again",
                      headers=close) from None
    if size > limits.max_body:
        raise large
    return bytes(body)


def _gate(key: str | None, hosts: Sequence[str] | None) -> Callable[[Request], Awaitable[None]]:
    async def gate(request: Request) -> None:
        if hosts is not None:
            name = request.url.hostname or ""
            if name not in hosts:
                raise Refusal(403, f"this server answers to {', '.join(hosts)} only; serve with a key to open it")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if key is not None and not (
            scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())
        ):
            raise Refusal(401, "the key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key",
                          headers={"WWW-Authenticate": "Bearer"})

    return gate


def _handle_errors(app: FastAPI, ledger: Ledger) -> None:
    """Every error in OpenAI's shape, and every answer's status counted."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Json:
        return Json(error.to_json(), status_code=error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Json:
        said = {404: "there is no such page; see /v1/models", 405: "this page does not take that method"}
        return Json(Refusal(error.status_code, said.get(error.status_code, str(error.detail))).to_json(),
                    status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Json:
        return Json(Refusal(500, "the server failed; its log has the details").to_json(), status_code=500)

    app.add_middleware(_Counted, ledger=ledger)


class _Counted:
    """Counts answers by status."""

    def __init__(self, app: Any, ledger: Ledger) -> None:
        self.app, self.ledger = app, ledger

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counting(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.ledger.add(f"status_{message['status']}")
            await send(message)

        await self.app(scope, receive, counting if scope["type"] == "http" else send)
