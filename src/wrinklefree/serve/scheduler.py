"""Many requests on one engine: a thread owns it, takes requests in between steps and hands tokens to asyncio.

submit -> waiting -> a slot, a token each step -> finished, or left by whoever asked
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from wrinklefree.core.errors import UserError
from wrinklefree.engine.engine import Sampling


class Engine(Protocol):
    """What `packed.engine.Engine` says of itself; calls come from one thread at a time."""

    context: int
    slots: int

    def open(self, prompt: Sequence[int], sampling: Sampling) -> int: ...
    def step(self) -> dict[int, int]: ...
    def finished(self, slot: int) -> str | None: ...
    def close(self, slot: int) -> None: ...


class BusyError(Exception):
    """As many requests as may wait are waiting."""


class ClosedError(Exception):
    """The server ends: nothing new is begun and what is open ends here."""


@dataclass(frozen=True)
class Event:
    """What happened to one request: it was opened (no token), got a token, maybe its last, or was refused."""

    kind: Literal["opened", "token", "refused", "closed"]
    token: int = 0
    finish: str | None = None  # with the last token: "stop" or "length"
    message: str = ""  # why it was refused


class Stream:
    """One request as asyncio sees it. `cancel` frees its slot at the next step."""

    def __init__(self, prompt: list[int], sampling: Sampling) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.cancelled = False
        self.finish: str | None = None
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    def cancel(self) -> None:
        self.cancelled = True

    async def opened(self) -> None:
        """Wait until it has a slot. Raises UserError where the engine refuses it, ClosedError where the server ends."""
        await self._next()

    async def tokens(self) -> AsyncIterator[int]:
        """Tokens as they come; `finish` says afterwards why no more do. Raises ClosedError where the server ends."""
        while self.finish is None:
            event = await self._next()
            self.finish = event.finish
            yield event.token

    async def _next(self) -> Event:
        event = await self.events.get()
        if event.kind == "refused":
            raise UserError(event.message)
        if event.kind == "closed":
            raise ClosedError
        return event


class Scheduler:
    """`run` is the thread's work; `submit` and `close` belong to the thread of the asyncio loop."""

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        self._changed = threading.Condition()  # guards the three below
        self._waiting: deque[Stream] = deque()
        self._open: dict[int, Stream] = {}  # by slot; only `run` changes it
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, prompt: list[int], sampling: Sampling) -> Stream:
        """Raises BusyError or ClosedError."""
        stream = Stream(prompt, sampling)
        with self._changed:
            if self._closed:
                raise ClosedError
            if len(self._waiting) + len(self._open) >= self.engine.slots + self.max_waiting:
                raise BusyError
            self._loop = asyncio.get_running_loop()
            self._waiting.append(stream)
            self._changed.notify()
        return stream

    def load(self) -> dict[str, int]:
        """Requests that are open, and that wait for a slot."""
        with self._changed:
            return {"open": len(self._open), "waiting": len(self._waiting)}

    def close(self) -> None:
        """End everything that is open or waits, and `run`; safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def run(self) -> None:
        """Step the engine while anything is open, sleep while nothing is, until `close`, or until the engine fails."""
        try:
            while self._wait_for_work():
                self._tell(self._admit())
                self._tell(self._step())
        finally:
            self._end_all()

    def _wait_for_work(self) -> bool:
        """Leave out what was given up. False once the server ends."""
        with self._changed:
            while True:
                if self._closed:
                    return False
                self._forget_cancelled()
                if self._open or self._waiting:
                    return True
                self._changed.wait()

    def _forget_cancelled(self) -> None:
        for slot in [slot for slot, stream in self._open.items() if stream.cancelled]:
            self.engine.close(slot)
            del self._open[slot]
        if any(stream.cancelled for stream in self._waiting):
            self._waiting = deque(stream for stream in self._waiting if not stream.cancelled)

    def _admit(self) -> list[tuple[Stream, Event]]:
        """Give free slots to those that wait, first come, first served."""
        events = []
        with self._changed:
            while self._waiting and len(self._open) < self.engine.slots:
                stream = self._waiting.popleft()
                try:
                    self._open[self.engine.open(stream.prompt, stream.sampling)] = stream
                except UserError as error:
                    events.append((stream, Event("refused", message=str(error))))
                else:
                    events.append((stream, Event("opened")))
        return events

    def _step(self) -> list[tuple[Stream, Event]]:
        if not self._open:
            return []
        events = []
        for slot, token in self.engine.step().items():
            finish = self.engine.finished(slot)
            events.append((self._open[slot], Event("token", token, finish)))
            if finish is not None:
                self.engine.close(slot)
                with self._changed:
                    del self._open[slot]
        return events

    def _tell(self, events: list[tuple[Stream, Event]]) -> None:
        """Wake the loop once for all of them."""
        if events:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(_deliver, events)

    def _end_all(self) -> None:
        with self._changed:
            self._closed = True
            streams = [*self._open.values(), *self._waiting]
            self._open.clear()
            self._waiting.clear()
        self._tell([(stream, Event("closed")) for stream in streams])


def _deliver(events: list[tuple[Stream, Event]]) -> None:
    for stream, event in events:
        stream.events.put_nowait(event)
