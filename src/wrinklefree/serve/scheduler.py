"""Answer many requests with one engine.

A thread owns the engine. Between two steps it takes new requests, and it passes each token to the asyncio loop. A
request goes through these states:

submit -> waiting -> in a slot, one token per step -> finished or cancelled

If the engine raises an error, the requests that it was working on fail, and the others go on.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from wrinklefree.core.errors import UserError
from wrinklefree.engine.sampling import Sampling
from wrinklefree.engine.scores import Score

log = logging.getLogger("wrinklefree")


class Engine(Protocol):
    """What the scheduler calls of an engine, always from one thread at a time; `engine.Engine` documents it."""

    context: int
    slots: int
    vocab: int

    def open(self, prompt: Sequence[int], sampling: Sampling) -> int: ...
    def step(self) -> dict[int, int]: ...
    def finished(self, slot: int) -> str | None: ...
    def scores(self, slot: int) -> list[Score]: ...
    def close(self, slot: int) -> None: ...
    def reset(self) -> None: ...


class BusyError(Exception):
    """The queue of waiting requests is full."""


class FailedError(Exception):
    """The engine raised an error while it worked on the request."""


class ClosedError(Exception):
    """The server is shutting down: new requests are refused and open ones are cut off."""


@dataclass(frozen=True)
class Event:
    """What happened to one request.

    It got a slot, got a token, was refused by the engine, the engine failed, or the server closed.
    """

    kind: Literal["opened", "token", "refused", "failed", "closed"]
    token: int = 0
    finish: str | None = None  # set with the last token: "stop" or "length"
    message: str = ""  # why it was refused
    scores: list[Score] = field(default_factory=list)  # of the token, after those of the prompt if they are wanted


class Stream:
    """One request, as the asyncio side sees it."""

    def __init__(self, prompt: list[int], sampling: Sampling) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.cancelled = False
        self.finish: str | None = None
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    def cancel(self) -> None:
        """Give up the request. Its slot is freed before the next step."""
        self.cancelled = True

    async def opened(self) -> None:
        """Wait until the request has a slot.

        Raises UserError if the engine refuses the prompt, FailedError if the engine raises an error, and ClosedError
        if the server shuts down.
        """
        await self._next()

    async def tokens(self) -> AsyncIterator[Event]:
        """Yield an event for each token as it is generated. Afterwards, `finish` says why there are no more.

        Raises FailedError if the engine raises an error, and ClosedError if the server shuts down.
        """
        while self.finish is None:
            event = await self._next()
            self.finish = event.finish
            yield event

    async def _next(self) -> Event:
        event = await self.events.get()
        if event.kind == "refused":
            raise UserError(event.message)
        if event.kind == "failed":
            raise FailedError
        if event.kind == "closed":
            raise ClosedError
        return event


class Scheduler:
    """Shares an engine between requests. A thread calls `run`; the asyncio loop calls `submit` and `close`."""

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        self._changed = threading.Condition()  # guards `_waiting`, `_open` and `_closed`
        self._waiting: deque[Stream] = deque()
        self._open: dict[int, Stream] = {}  # by slot; only `run` changes it
        self._closed = False
        self._failures = 0  # errors that the engine raised
        self._opened = self._read = self._generated = 0  # requests that got a slot, their tokens, and those of answers
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, asked: Sequence[tuple[list[int], Sampling]]) -> list[Stream]:
        """Queue the prompts of one request, all or none.

        Raises BusyError if too many are waiting, and ClosedError while the server shuts down.
        """
        streams = [Stream(prompt, sampling) for prompt, sampling in asked]
        with self._changed:
            if self._closed:
                raise ClosedError
            if len(self._waiting) + len(self._open) >= self.engine.slots + self.max_waiting:
                raise BusyError
            self._loop = asyncio.get_running_loop()
            self._waiting.extend(streams)
            self._changed.notify()
        return streams

    def load(self) -> dict[str, int]:
        """How many requests are open (have a slot) and waiting for one, and how often the engine has failed."""
        with self._changed:
            return {"open": len(self._open), "waiting": len(self._waiting), "failures": self._failures}

    def totals(self) -> dict[str, int]:
        """How many requests got a slot since the start, and how many tokens they had and got."""
        with self._changed:
            return {"requests": self._opened, "prompt_tokens": self._read, "generated_tokens": self._generated}

    def close(self) -> None:
        """End all requests and make `run` return. It is safe to call this twice."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def run(self) -> None:
        """Step the engine while there are requests, and sleep while there are none. Returns after `close`."""
        try:
            while self._wait_for_work():
                self._tell(self._admit())
                self._tell(self._step())
        finally:
            self._end_all()

    def _wait_for_work(self) -> bool:
        """Drop cancelled requests, then wait until there is one to answer. Returns False once the server shuts down."""
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
        """Give free slots to waiting requests, first come, first served."""
        events = []
        with self._changed:
            while self._waiting and len(self._open) < self.engine.slots:
                stream = self._waiting.popleft()
                try:
                    self._open[self.engine.open(stream.prompt, stream.sampling)] = stream
                except UserError as error:
                    events.append((stream, Event("refused", message=str(error))))
                except Exception:  # whatever one request does to the engine, the others are served
                    self._note_failure("a request that it could not open")
                    events.append((stream, Event("failed")))
                else:
                    events.append((stream, Event("opened")))
                    self._opened, self._read = self._opened + 1, self._read + len(stream.prompt)
        return events

    def _step(self) -> list[tuple[Stream, Event]]:
        if not self._open:
            return []
        try:
            tokens = self.engine.step()
        except Exception:  # see _admit
            return self._fail()
        self._generated += len(tokens)
        events = []
        for slot, token in tokens.items():
            finish, stream = self.engine.finished(slot), self._open[slot]
            scores = [] if stream.sampling.logprobs is None else self.engine.scores(slot)
            events.append((stream, Event("token", token, finish, scores=scores)))
            if finish is not None:
                self.engine.close(slot)
                with self._changed:
                    del self._open[slot]
        return events

    def _fail(self) -> list[tuple[Stream, Event]]:
        """After a step that failed: end its requests, and give the engine a fresh start."""
        with self._changed:
            streams = list(self._open.values())
            self._open.clear()
        self._note_failure(f"{len(streams)} requests, which fail")
        self.engine.reset()
        return [(stream, Event("failed")) for stream in streams]

    def _note_failure(self, what: str) -> None:
        self._failures += 1
        log.exception("the engine raised an error on %s", what)

    def _tell(self, events: list[tuple[Stream, Event]]) -> None:
        """Deliver events to the asyncio loop, which is woken once for all of them."""
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
