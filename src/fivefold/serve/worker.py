"""The worker: one thread that owns the one engine session, fed by a bounded queue.

A session is not thread-safe and a CPU engine already uses every core for one request, so requests take turns; what
does not fit into the queue is refused at once (429) instead of waiting without end. A job that is cancelled leaves
the queue at once, or, when it is running, stops at its next token: the generator is closed and the turn passes on.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from fivefold.engines import Sampling, Session
from fivefold.errors import FivefoldError
from fivefold.serve.ledger import Bill, Ledger
from fivefold.serve.stops import Stops
from fivefold.serve.wire import Refusal

log = logging.getLogger("fivefold.serve")


class Decoder(Protocol):
    """Token ids in, text out as soon as it is whole characters."""

    def feed(self, token: int) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one choice; `reason` is set on its last piece."""

    index: int
    text: str
    reason: Literal["stop", "length"] | None = None


Event = Piece | Bill | Refusal
"""What a job emits: pieces, then exactly one Bill (all went well) or Refusal (it did not)."""


@dataclass(kw_only=True, eq=False)
class Job:
    """`emit` is called from the worker's thread, once more after cancelling at most.

    Text is emitted at most once in `every` seconds: waking the event loop costs more than drawing a token of a small
    model. Text waits for one more token at most, because tokens slower than `every` are emitted as they come.
    """

    prompts: Sequence[Sequence[int]]
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    emit: Callable[[Event], None]
    every: float
    bill: Bill = field(default_factory=Bill)
    queued: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)


class Worker:
    """`start` loads the session in the worker's own thread and raises what loading raises."""

    def __init__(
        self, factory: Callable[[], Session], decoder: Callable[[], Decoder], ledger: Ledger, *, max_queue: int
    ) -> None:
        self._factory, self._decoder, self._ledger, self._max_queue = factory, decoder, ledger, max_queue
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._draining = self._closed = False
        self._loaded: BaseException | Session | None = None
        self._pace = 1.0
        self._thread = threading.Thread(target=self._main, name="fivefold-engine", daemon=True)

    def start(self) -> Session:
        """The session, once it is open; further calls only return it."""
        with self._changed:
            if self._loaded is None and not self._thread.is_alive():
                self._thread.start()
            self._changed.wait_for(lambda: self._loaded is not None)
        if isinstance(self._loaded, BaseException):
            raise self._loaded
        assert self._loaded is not None
        return self._loaded

    @property
    def draining(self) -> bool:
        return self._draining

    def load(self) -> tuple[int, int]:
        """(running, waiting)."""
        with self._changed:
            return int(self._running is not None), len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queue the job. Raises Refusal: 503 while stopping, 429 when the queue is full."""
        with self._changed:
            if self._draining:
                raise STOPPING
            if len(self._waiting) >= self._max_queue + (self._running is None):
                wait = max(1, math.ceil(self._pace * (len(self._waiting) + 1)))
                raise Refusal(
                    429, f"{len(self._waiting)} requests are already waiting; try again in {wait} s",
                    code="queue_full", headers={"Retry-After": str(min(wait, 600))},
                )
            self._waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """The client has gone or the time is up. Harmless when the job has finished."""
        with self._changed:
            if job.cancelled.is_set():
                return
            job.cancelled.set()
            with contextlib.suppress(ValueError):
                self._waiting.remove(job)
                self._ledger.add("cancelled")

    def drain(self) -> None:
        """Refuse all that waits and all that comes; the running job goes on."""
        with self._changed:
            self._draining = True
            refused, self._waiting = list(self._waiting), deque()
            self._changed.notify_all()
        for job in refused:
            job.emit(STOPPING)

    def close(self, grace: float = 5.0) -> None:
        """Drain, cancel what runs, and close the session; at most `grace` seconds."""
        self.drain()
        with self._changed:
            self._closed = True
            running = self._running
            self._changed.notify_all()
        if running:
            self.cancel(running)
        self._thread.join(grace)

    def _main(self) -> None:
        try:
            session = self._factory()
        except BaseException as error:
            self._tell_loaded(error)
            return
        self._tell_loaded(session)
        try:
            while (job := self._next()) is not None:
                self._serve(session, job)
        finally:
            session.close()

    def _tell_loaded(self, outcome: BaseException | Session) -> None:
        with self._changed:
            self._loaded = outcome
            self._changed.notify_all()

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _serve(self, session: Session, job: Job) -> None:
        job.bill.waited = time.monotonic() - job.queued
        last: Event = job.bill
        try:
            with self._ledger.window(job.bill):
                start = time.perf_counter()
                for index, prompt in enumerate(job.prompts):
                    self._answer(session, job, index, prompt, start)
        except FivefoldError as error:
            last = Refusal(500, f"the engine failed: {error}", code="engine_failed")
        except Exception:
            log.exception("a request failed in the engine")
            last = Refusal(500, "the engine failed; the server's log has the details", code="engine_failed")
        self._pace = 0.7 * self._pace + 0.3 * job.bill.seconds
        self._ledger.add("failed" if isinstance(last, Refusal) else "cancelled" if job.cancelled.is_set() else "done")
        with self._changed:
            self._running = None
        job.emit(last)

    def _answer(self, session: Session, job: Job, index: int, prompt: Sequence[int], start: float) -> None:
        """One choice. Ends at a stop token, a stop string, the token limit, or when the job is cancelled."""
        if job.cancelled.is_set():
            return
        bill, decoder, stops = job.bill, self._decoder(), Stops(job.stops)
        bill.prompt_tokens += len(prompt)
        drawn, held, emitted = 0, "", -math.inf
        with contextlib.closing(session.generate(prompt, job.max_tokens, job.sampling)) as tokens:  # type: ignore[type-var]
            for token in tokens:
                drawn += 1
                bill.completion_tokens += 1
                if bill.ttft is None:
                    bill.ttft = time.perf_counter() - start
                if job.cancelled.is_set():
                    return
                held += stops.push(decoder.feed(token))
                if stops.hit:
                    break
                if held and time.monotonic() - emitted >= job.every:
                    job.emit(Piece(index, held))
                    held, emitted = "", time.monotonic()
        rest = held if stops.hit else held + stops.push(decoder.flush()) + stops.flush()
        ended = stops.hit or drawn < job.max_tokens
        job.emit(Piece(index, rest, "stop" if ended else "length"))


STOPPING = Refusal(503, "the server is stopping; try again in a moment", code="stopping",
                   headers={"Retry-After": "5"})
