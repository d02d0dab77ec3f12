"""The models behind one server: each is opened when it is first asked for, and closed if another needs its memory.

An open model has a thread for its engine and one for its tokenizer, so models answer at the same time. `Models` itself
belongs to the asyncio loop.
"""

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from wrinklefree.core.errors import UserError
from wrinklefree.serve.errors import ApiError, ending
from wrinklefree.serve.scheduler import Engine, Scheduler
from wrinklefree.serve.structured import Grammars

log = logging.getLogger("wrinklefree")


@dataclass(frozen=True)
class Limits:
    """The longest prompt and answer that are accepted, in tokens."""

    prompt: int
    answer: int

    @property
    def body(self) -> int:
        """The longest body in bytes. A token rarely has more than 64 bytes; the rest is for the other fields."""
        return 2**16 + 64 * self.prompt

    def within(self, context: int) -> "Limits":
        """These limits for a model of `context` tokens."""
        return Limits(min(self.prompt, context - 1), min(self.answer, context - 1))


@dataclass(frozen=True)
class Model:
    """A model that can be asked: its name, tokenizer and stop tokens."""

    name: str
    tokenizer: Any
    ends: frozenset[int]  # tokens that end an answer
    engine: str = ""  # what runs the model, in a few words
    allow_special: bool = False  # whether special tokens in a text of a request are read as such


@dataclass(frozen=True)
class Opened:
    """What opening a model gives."""

    model: Model
    engine: Engine
    memory: int = 0  # bytes that it takes at most, now that its weights are there


@dataclass(frozen=True)
class Offer:
    """A model that is opened when it is asked for."""

    name: str
    open: Callable[[], Opened]
    memory: int = 0  # bytes that it takes at most, as its files tell
    created: int = field(default_factory=lambda: int(time.time()))

    def about(self) -> dict[str, Any]:
        """The model object of the OpenAI interface."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "wrinklefree"}


class Served:
    """An open model."""

    def __init__(self, opened: Opened, limits: Limits, max_waiting: int) -> None:
        model, engine = opened.model, opened.engine
        self.model, self.memory, self.limits = model, opened.memory, limits.within(engine.context)
        self.scheduler = Scheduler(engine, max_waiting)
        self.grammars = Grammars(model.tokenizer, engine.vocab, model.ends)
        # Prompts are tokenized in one thread of their own, so that a long one does not hold up the running streams.
        self.encoder = ThreadPoolExecutor(1, "encode")
        self.preparing = 0  # requests that the scheduler does not know yet
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.scheduler.run()
        except Exception:  # the next request opens the model again
            log.exception("the engine of %s has ended", self.model.name)

    def runs(self) -> bool:
        """Whether its engine takes requests."""
        return self._thread.is_alive()

    def is_idle(self) -> bool:
        """Whether nobody waits for an answer."""
        load = self.scheduler.load()
        return not (self.preparing or load["open"] or load["waiting"])

    def close(self) -> None:
        """End all requests. It is safe to call this twice."""
        self.scheduler.close()
        self.encoder.shutdown(wait=False)

    def join(self) -> None:
        """Wait until its thread has ended, after `close`."""
        self._thread.join()


class Models:
    """All models of a server, by name.

    With `most`, the models that are open take no more than so many bytes.
    """

    def __init__(self, offers: Sequence[Offer], limits: Limits, max_waiting: int, most: int | None = None) -> None:
        self.offers = {offer.name: offer for offer in offers}
        self.limits, self._max_waiting, self._most = limits, max_waiting, most
        self._open: dict[str, Served] = {}  # the least recently used first
        self._past: dict[str, int] = {}  # counts of models that have been closed
        self._one_opens = asyncio.Lock()
        self._closed = False

    def about(self, name: str) -> dict[str, Any]:
        """The model object of one model. Raises ApiError 404 if there is none of this name."""
        return self._offer(name).about()

    def only(self, name: str) -> str:
        """`name`, or the name of the first model if it is empty."""
        return name or next(iter(self.offers))

    def _offer(self, name: str) -> Offer:
        if name not in self.offers:
            known = ", ".join(map(repr, self.offers))
            text = f"there is no model {name[:100]!r} here, only {known}"
            raise ApiError(404, text, "model", "model_not_found")
        return self.offers[name]

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Served]:
        """An open model, which stays open until requests have been submitted to it.

        Raises ApiError 404 if there is no such model, 429 if there is no room for it now, and 500 if it cannot be
        opened.
        """
        served = self.running(name) or await self._opened(self._offer(name))
        served.preparing += 1
        try:
            yield served
        finally:
            served.preparing -= 1

    def running(self, name: str) -> Served | None:
        """The model if it is open, which makes it the most recently used."""
        served = self._open.get(name)
        if served is None or not served.runs():
            return None
        self._open[name] = self._open.pop(name)
        return served

    async def _opened(self, offer: Offer) -> Served:
        async with self._one_opens:
            if (served := self.running(offer.name)) is not None:  # opened while this request waited
                return served
            if self._closed:
                raise ending()
            await self._end(offer.name)  # if its engine has ended by itself
            if not await self._make_room(offer.name, offer.memory):
                text = f"no room for {offer.name!r} beside the models that answer now: try again later"
                raise ApiError(429, text, code="busy", headers={"Retry-After": "1"})
            try:
                served = await asyncio.get_running_loop().run_in_executor(None, self._serve, offer)
            except UserError as error:
                log.error("%s cannot be opened: %s", offer.name, error)
                raise ApiError(500, f"the model {offer.name} cannot be opened", "model", "model_failed") from None
            self._open[offer.name] = served
            await self._make_room(offer.name, 0)  # it may take more than its files told
            return served

    def start(self, offer: Offer) -> None:
        """Open a model before there is a loop. Raises UserError if it cannot be opened."""
        self._open[offer.name] = self._serve(offer)

    def _serve(self, offer: Offer) -> Served:
        served = Served(offer.open(), self.limits, self._max_waiting)
        if self._closed:  # while it was being opened
            served.close()
        return served

    async def _make_room(self, name: str, more: int) -> bool:
        """Close idle models but `name`, the least recently used first, until there is room for `more` bytes.

        Returns whether there is room.
        """
        while self._most is not None and sum(s.memory for s in self._open.values()) + more > self._most:
            idle = next((other for other, s in self._open.items() if other != name and s.is_idle()), None)
            if idle is None:
                return False
            log.info("closing %s, because %s needs its memory", idle, name)
            await self._end(idle)
        return True

    async def _end(self, name: str) -> None:
        """Close a model if it is open, and free its memory."""
        served = self._open.pop(name, None)
        if served is None:
            return
        served.close()
        await asyncio.get_running_loop().run_in_executor(None, served.join)
        for count, value in _counts(served).items():
            self._past[count] = self._past.get(count, 0) + value
        del served
        gc.collect()  # modules of transformers refer to one another

    def states(self) -> list[dict[str, Any]]:
        """What is told about each model: whether it is open, what runs it, and the bytes that it takes."""
        return [
            offer.about() | {"open": served is not None, "engine": served.model.engine if served else "", "bytes": size}
            for offer in self.offers.values()
            for served in [self._open.get(offer.name)]
            for size in [served.memory if served else 0]
        ]

    def engine(self) -> str:
        """What runs the model that was asked for last."""
        return next((served.model.engine for served in reversed(self._open.values())), "")

    def slots(self) -> int:
        """How many requests the open models answer at the same time."""
        return sum(served.scheduler.engine.slots for served in self._open.values())

    def load(self) -> dict[str, int]:
        """How many requests are open and waiting, and how often an engine has failed."""
        loads = [served.scheduler.load() for served in self._open.values()]
        counted = {name: sum(load[name] for load in loads) for name in ("open", "waiting", "failures")}
        counted["failures"] += self._past.get("failures", 0)
        return counted

    def totals(self) -> dict[str, int]:
        """How many requests got a slot since the start, and how many tokens they had and got."""
        counts = [self._past, *map(_counts, self._open.values())]
        return {n: sum(c.get(n, 0) for c in counts) for n in ("requests", "prompt_tokens", "generated_tokens")}

    def close(self) -> None:
        """End all requests. It is safe to call this twice."""
        self._closed = True
        for served in list(self._open.values()):
            served.close()

    def join(self) -> None:
        """Wait until all threads have ended, after `close`."""
        for served in list(self._open.values()):
            served.join()


def _counts(served: Served) -> dict[str, int]:
    return served.scheduler.totals() | {"failures": served.scheduler.load()["failures"]}
