"""Answers: a job's events -> one JSON body, or a stream of server-sent events.

Both watch the connection while they wait: when the client leaves, the job is cancelled and the engine's turn passes
on. A stream begins only with its first token, so whatever fails before that still gets a true status code; a failure
after it is sent as a last `error` event.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi.responses import Response

from fivefold.serve import ledger as books
from fivefold.serve.ledger import Bill, Ledger
from fivefold.serve.wire import Ask, Refusal, dumps
from fivefold.serve.worker import Event, Job, Piece, Worker

Events = asyncio.Queue[Event]


def event_queue() -> tuple[Events, Callable[[Event], None]]:
    """A queue on this event loop, and the function that fills it from another thread."""
    loop = asyncio.get_running_loop()
    events: Events = asyncio.Queue()

    def emit(event: Event) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, event)

    return events, emit



class Answer(Response):
    def __init__(
        self, ask: Ask, number: str, model: str, job: Job, events: Events, worker: Worker, ledger: Ledger,
        bytes_in: int, timeout: float,
    ) -> None:
        super().__init__()
        self.ask, self.job, self.events, self.worker, self.ledger = ask, job, events, worker, ledger
        self.bytes_in, self.timeout = bytes_in, timeout
        self.base = {"id": number, "created": int(time.time()), "model": model}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        watch = asyncio.ensure_future(_left(receive))
        work = asyncio.ensure_future(self.answer(send))
        try:
            await asyncio.wait({watch, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self.worker.cancel(self.job)
            watch.cancel()
            work.cancel()
            await asyncio.gather(watch, work, return_exceptions=True)

    async def answer(self, send: Any) -> None:
        raise NotImplementedError

    async def arriving(self) -> AsyncIterator[list[Event]]:
        """All events there are, each time there are some; ends after the Bill. Raises Refusal."""
        try:
            async with asyncio.timeout(self.timeout):
                while True:
                    batch = [await self.events.get()]
                    while not self.events.empty():
                        batch.append(self.events.get_nowait())
                    if isinstance(batch[-1], Refusal):
                        raise batch[-1]
                    yield batch
                    if isinstance(batch[-1], Bill):
                        return
        except TimeoutError:
            raise Refusal(504, f"the request took longer than {self.timeout:g} s; ask for fewer tokens",
                          code="timeout") from None

    def usage(self, bytes_out: int) -> dict[str, Any]:
        return self.job.bill.usage(self.ledger, self.bytes_in, bytes_out)


class Whole(Answer):
    async def answer(self, send: Any) -> None:
        texts = [""] * len(self.job.prompts)
        reasons: list[str | None] = [None] * len(texts)
        try:
            async for batch in self.arriving():
                for event in batch:
                    if isinstance(event, Piece):
                        texts[event.index] += event.text
                        reasons[event.index] = event.reason
        except Refusal as refusal:
            await _send(send, refusal.status, dumps(refusal.to_json()), refusal.headers)
            return
        chat = self.ask.kind == "chat"
        data = {
            **self.base, "object": "chat.completion" if chat else "text_completion",
            "choices": [
                {"index": i, **({"message": {"role": "assistant", "content": t}} if chat else {"text": t}),
                 "logprobs": None, "finish_reason": r}
                for i, (t, r) in enumerate(zip(texts, reasons, strict=True))
            ],
        }
        usage = self.usage(len(dumps(data)))
        await _send(send, 200, dumps({**data, "usage": usage}), books.headers(usage))


class Streamed(Answer):
    async def answer(self, send: Any) -> None:
        self.started, self.sent = False, 0
        try:
            async for batch in self.arriving():
                lines = b"".join(self.line(e) for e in batch if isinstance(e, Piece))
                if lines:
                    await self.push(send, lines)
            end = b""
            if self.ask.include_usage:
                end = _sse({**self.chunk(), "choices": [], "usage": self.usage(self.sent)})
            await self.push(send, end + b"data: [DONE]\n\n", more=False)
        except Refusal as refusal:
            if self.started:
                await self.push(send, _sse(refusal.to_json()), more=False)
            else:
                await _send(send, refusal.status, dumps(refusal.to_json()), refusal.headers)

    def chunk(self) -> dict[str, Any]:
        return {**self.base, "object": "chat.completion.chunk" if self.ask.kind == "chat" else "text_completion"}

    def line(self, piece: Piece) -> bytes:
        out = self.choice(piece.index, piece.text, None) if piece.text else b""
        return out + self.choice(piece.index, None, piece.reason) if piece.reason else out

    def choice(self, index: int, text: str | None, reason: str | None) -> bytes:
        if self.ask.kind == "chat":
            body: dict[str, Any] = {"delta": {} if text is None else {"content": text}}
        else:
            body = {"text": text or ""}
        data = {**self.chunk(), "choices": [{"index": index, **body, "logprobs": None, "finish_reason": reason}]}
        return _sse({**data, "usage": None} if self.ask.include_usage else data)

    async def push(self, send: Any, data: bytes, more: bool = True) -> None:
        if not self.started:
            self.started = True
            await _start(send, 200, {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store",
                                     "X-Accel-Buffering": "no"})
            if self.ask.kind == "chat":
                role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                        "finish_reason": None}
                data = _sse({**self.chunk(), "choices": [role]}) + data
        self.sent += len(data)
        await send({"type": "http.response.body", "body": data, "more_body": more})


def _sse(data: Mapping[str, Any]) -> bytes:
    return b"data: " + dumps(data) + b"\n\n"


async def _left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Any, status: int, headers: Mapping[str, str]) -> None:
    raw = [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def _send(send: Any, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    await _start(send, status, {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers})
    await send({"type": "http.response.body", "body": body})
