"""The server process: its socket, its signals, its end."""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from stars_kernels.decoder.checks import is_int
from stars_kernels.hf.engine import Engine
from stars_kernels.serve.app import make_app
from stars_kernels.serve.service import Service

log = logging.getLogger("stars_kernels.serve")
HOST, PORT = "127.0.0.1", 8000
BACKLOG = 2048
"""Connections that the system keeps until they are accepted."""
LAST_WORDS = 5
"""Seconds that clients have to read what they were sent, once nothing is under way."""


def serve(
    engine: Engine,
    host: str = HOST,
    port: int = PORT,
    *,
    ready: Callable[[str], None] | None = None,
    **options: Any,
) -> None:
    """Serve an engine until SIGTERM or SIGINT; then requests under way end, for `Limits.grace` seconds at most.

    Args:
        port: 0 = any that is free.
        ready: is told the URL, once requests are answered there.
        options: of `make_app`: calibration, model_name, api_key, limits.

    Raises:
        ValueError: as `make_app`.
        OSError: the port cannot be taken.
    """
    server, sock = _prepared(engine, host, port, ready, options)
    with sock:
        server.run(sockets=[sock])


@contextmanager
def running(engine: Engine, host: str = HOST, port: int = 0, **options: Any) -> Iterator[str]:
    """Serve an engine from a thread until the end of the block, which gets the URL; arguments as of `serve`."""
    up, found = threading.Event(), list[str]()

    def ready(url: str) -> None:
        found.append(url)
        up.set()

    server, sock = _prepared(engine, host, port, ready, options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="stars_kernels.serve", daemon=True)
    with sock:
        thread.start()
        try:
            while not up.wait(0.1):
                if not thread.is_alive():
                    raise RuntimeError("the server ended before it was up; its thread says why")
            yield found[0]
        finally:
            server.service.drain()
            thread.join()


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach a server there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Server(uvicorn.Server):
    """Ends once nothing is under way, or the time of grace is over, after a first signal; at once after a second."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self._ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = self.service.draining is not None
        self.force_exit = self.should_exit
        self.service.drain()

    async def on_tick(self, counter: int) -> bool:
        service = self.service
        if service.draining is not None:
            over = time.monotonic() - service.draining >= service.limits.grace
            self.should_exit = self.should_exit or over or not service.under_way
        if self.should_exit:
            service.cut()
        return await super().on_tick(counter)


def _prepared(
    engine: Engine, host: str, port: int, ready: Callable[[str], None] | None, options: dict[str, Any]
) -> tuple[Server, socket.socket]:
    """Make a server, and take its port."""
    app = make_app(engine, **options)
    if not is_loopback(host) and options.get("api_key") is None:
        log.warning("everyone who can reach %s can use this server: it asks for no API key", host)
    sock = _socket(host, port)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{sock.getsockname()[1]}"
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", ws="none", server_header=False,
        timeout_graceful_shutdown=LAST_WORDS,
    )  # fmt: skip
    return Server(config, app.state.service, lambda: None if ready is None else ready(url)), sock


def _socket(host: str, port: int) -> socket.socket:
    """Take a port, and listen there."""
    if not (is_int(port) and 0 <= port < 2**16):
        raise ValueError(f"port is {port!r}, expected 0 to {2**16 - 1}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConnectionError(
            f"port {port} of {host} cannot be taken, expected one that is free: {error.strerror}"
        ) from None
