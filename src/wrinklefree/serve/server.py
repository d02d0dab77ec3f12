"""The server process: a thread runs each engine, and one asyncio loop handles the connections.

On SIGINT or SIGTERM no new requests are accepted. Open streams have `GRACE` seconds to finish; after that they get an
error event and are cut off. If the engine fails, its requests fail and the server goes on.
"""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from wrinklefree.core.errors import UserError
from wrinklefree.serve.app import Service

GRACE = 2.0  # seconds that open streams have to finish after a signal
LAST = 1  # seconds more for connections that have not ended by themselves


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not listening yet. Raises UserError if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY, which sends small pieces at once, only if the protocol is named here.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    # On POSIX this option allows a port that was just left. On Windows it would take over a port that is in use.
    if os.name == "posix":
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; another --port may be free") from None
    return bound


def url(bound: socket.socket) -> str:
    """The address of a bound socket as a URL."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(service: Service, bound: socket.socket, announce: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM. `announce` is called once the server accepts requests."""
    # asyncio warns of every write to a client that has gone.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    with _signals_end_it():
        asyncio.run(_run(service, bound, announce))


class _Server(uvicorn.Server):
    """uvicorn that calls `announce` once it has started, and `end` some seconds after a signal."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None], end: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce, self._end = announce, end
        self._loop = asyncio.get_running_loop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._loop.call_soon_threadsafe(self._loop.call_later, GRACE, self._end)


async def _run(service: Service, bound: socket.socket, announce: Callable[[], None]) -> None:
    models = service.models
    config = uvicorn.Config(
        service.app(),
        log_config=None,
        log_level="critical",  # the app logs its own errors; uvicorn would add those of connections cut off at the end
        access_log=False,
        lifespan="off",
        server_header=False,
        ws="none",
        backlog=1024,
        timeout_graceful_shutdown=round(GRACE) + LAST,
    )
    try:
        await _Server(config, announce, models.close).serve([bound])
    finally:
        models.close()
        await asyncio.get_running_loop().run_in_executor(None, models.join)


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM outside of uvicorn, which raises the signals that it got again after it has ended."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
