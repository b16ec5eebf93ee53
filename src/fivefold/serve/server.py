"""serve(): load, check, listen, and stop with grace.

On SIGTERM or SIGINT the queue is answered with 503, the running request may finish within `grace` seconds, then the
port is closed. Loopback is the default; another address needs a key, because whoever can reach the port can use the
machine.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fivefold.errors import MissingExtra, UserError
from fivefold.model import Model, load

SECONDS_OF_GRACE = 30


def say(sentence: str) -> None:
    print(sentence, flush=True)


def serve(
    path: Model | str | Path, host: str = "127.0.0.1", port: int = 8080, key: str | None = None, *,
    max_queue: int = 16, max_tokens: int = 1024, max_body: int = 1 << 20, timeout: float = 600.0,
    grace: float = SECONDS_OF_GRACE, ready: Callable[[str], None] = say,
) -> None:
    """Serve a model, an artifact folder, a GGUF file or a bundled name until stopped. Port 0 picks a free one.

    `ready` is told one sentence with the address when the port is open. Raises UserError in one sentence.
    """
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, extra="serve")
    check_exposure(host, key)
    from fivefold.engines import open_session
    from fivefold.machine import Machine
    from fivefold.meters.money import Prices
    from fivefold.serve.app import LOOPBACK, Limits, create_app
    from fivefold.serve.ledger import Ledger
    from fivefold.tokenizer import Tokenizer

    model = path if isinstance(path, Model) else load(path)
    app = create_app(
        model, session_factory=lambda: open_session(model), texts=Tokenizer(model.tokenizer_file),
        ledger=Ledger(Machine.probe(), Prices.load()), key=key, hosts=None if key else LOOPBACK,
        limits=Limits(max_queue=max_queue, max_tokens=max_tokens, max_body=max_body, timeout=timeout),
    )
    run(app, bind(host, port), grace=grace, ready=lambda address: ready(f"{model.name} is served on {address}/v1"))


def check_exposure(host: str, key: str | None) -> None:
    """Raises UserError for an address others can reach, without a key."""
    if key is not None and not key.strip():
        raise UserError("the key is empty; give one that cannot be guessed, or none and stay on 127.0.0.1")
    if key is None and not _loopback(host):
        raise UserError(f"{host} can be reached from other machines; give a key (--key), or serve on 127.0.0.1")


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError when the address is taken or unknown."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen on {host}:{port} ({why}); choose another --port") from None
    return listener


def run(
    app: Any, listener: socket.socket, *, grace: float = SECONDS_OF_GRACE, ready: Callable[[str], None] = say
) -> None:
    """Serve `app` on the socket until a signal. A session that cannot be opened raises its own error."""
    import uvicorn

    worker = app.state.worker
    name, port = listener.getsockname()[:2]
    address = f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"

    class Server(uvicorn.Server):
        stopping = False

        def handle_exit(self, sig: int, frame: Any) -> None:
            """Not raised again afterwards: a stop that was asked for ends with exit code 0. A second one hurries."""
            self.force_exit, self.stopping = self.stopping, True
            self.should_exit = True

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                ready(address)

        async def shutdown(self, sockets: Any = None) -> None:
            worker.drain()
            await super().shutdown(sockets=sockets)

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="on", server_header=False, date_header=False,
        timeout_graceful_shutdown=max(1, round(grace)), limit_concurrency=256,
    )
    worker.start()
    with listener:
        Server(config).run(sockets=[listener])
