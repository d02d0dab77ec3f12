"""The process: one thread with the engine, one asyncio loop with the connections, and their end.

SIGINT and SIGTERM: nothing new is taken, streams have `GRACE` seconds to finish, then they are told and cut off. An
error in the engine's thread ends the server the same way and is raised again.
"""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType

import uvicorn

from wrinklefree.core.errors import UserError
from wrinklefree.serve.app import Service

GRACE = 2.0  # seconds
LAST = 1  # more, for connections that do not end by themselves


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet. Raises UserError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small pieces at once (TCP_NODELAY) only where the protocol is named.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name == "posix":  # a port that was just left; elsewhere the option would take one that is in use
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; another --port may be free") from None
    return bound


def url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(service: Service, bound: socket.socket, announce: Callable[[], None]) -> None:
    """Serve until a signal comes; `announce` is called once requests are taken."""
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each piece that a client left unread
    with _signals_end_it():
        asyncio.run(_run(service, bound, announce))


class _Server(uvicorn.Server):
    """uvicorn, which says when it has begun and lets streams end after a signal."""

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
    scheduler = service.scheduler
    config = uvicorn.Config(
        service.app(),
        log_config=None,
        log_level="critical",  # the app logs its own errors; what is left are connections that are cut off at the end
        access_log=False,
        lifespan="off",
        server_header=False,
        ws="none",
        backlog=1024,
        timeout_graceful_shutdown=round(GRACE) + LAST,
    )
    server = _Server(config, announce, scheduler.close)
    with ThreadPoolExecutor(1, "engine") as pool:
        working = asyncio.get_running_loop().run_in_executor(pool, scheduler.run)
        try:
            serving = asyncio.ensure_future(server.serve([bound]))
            await asyncio.wait({working, serving}, return_when=asyncio.FIRST_COMPLETED)
            server.should_exit = True
            await serving
        finally:
            scheduler.close()
            service.close()
        await working


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """uvicorn raises the signals that it got once more when it has ended: here they mean nothing further."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
