"""Limits of the endpoint: who waits, leaves or breaks off, on a server under load and an engine that the test steps."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from openai import OpenAI
from serving import LONGEST, PROMPT, Process, said, until

from wrinklefree.engine.sampling import Sampling
from wrinklefree.serve import server
from wrinklefree.serve.app import Service
from wrinklefree.serve.models import Limits, Model, Models, Offer, Opened

LINUX = sys.platform == "linux"


def resources(process: Process) -> tuple[int, int]:
    """Threads and open files of the server; zeros where the system does not tell."""
    if not LINUX:
        return 0, 0
    return tuple(len(os.listdir(f"/proc/{process.popen.pid}/{kind}")) for kind in ("task", "fd"))  # type: ignore[return-value]


async def break_off(url: str, number: int) -> None:
    """Ask for a long answer, read some of it or nothing, and leave."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    stream = number % 3 < 2
    body = json.dumps({"model": "toy", "prompt": PROMPT, "max_tokens": LONGEST, "stream": stream}).encode()
    kind = "Content-Type: application/json"
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    writer.write(head + body[: len(body) - 5 * (number % 7 == 0)])
    if stream and number % 7:
        await reader.readuntil(b"data: ")
    else:
        await asyncio.sleep(0.05)
    if number % 2:
        writer.transport.abort()  # reset
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def ask(client: httpx.AsyncClient) -> str:
    body = {"model": "toy", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    return (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]


async def hundred_of_each(url: str) -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=200)) as client:
        asked = [ask(client) for _ in range(100)]
        return (await asyncio.gather(*asked, *(break_off(url, number) for number in range(100))))[:100]  # type: ignore[return-value]


def test_two_hundred_connections_half_of_which_break_off(process: Process, client: OpenAI) -> None:
    expected = said(client, max_tokens=8)
    client.close()
    until(lambda: resources(process)[1] == min(resources(process)[1] for _ in range(20)))
    before = resources(process)
    assert asyncio.run(hundred_of_each(process.url)) == [expected] * 100
    until(process.is_idle)
    until(lambda: resources(process) <= before)
    assert process.popen.poll() is None


class Counting:
    """An engine that says `0 1 2 ...`, each token when it is let."""

    context, vocab = 10**6, 10**6

    def __init__(self, slots: int) -> None:
        self.slots, self.tokens, self.sampling = slots, dict[int, int](), dict[int, Sampling]()
        self.steps = threading.Semaphore(0)
        self.breaks_at = 10**9

    def open(self, prompt: Sequence[int], sampling: Sampling) -> int:
        slot = min(set(range(self.slots)) - self.tokens.keys())
        self.tokens[slot], self.sampling[slot] = -1, sampling
        return slot

    def step(self) -> dict[int, int]:
        self.steps.acquire()
        for slot in self.tokens:
            self.tokens[slot] += 1
        if max(self.tokens.values()) >= self.breaks_at:
            raise RuntimeError("the engine is broken")
        return dict(self.tokens)

    def finished(self, slot: int) -> str | None:
        return "length" if self.tokens[slot] + 1 == self.sampling[slot].max_new_tokens else None

    def close(self, slot: int) -> None:
        del self.tokens[slot]

    def reset(self) -> None:
        self.tokens.clear()


class Numbers:
    """A tokenizer whose tokens are numbers."""

    chat_template = None

    def __call__(self, text: str, **options: Any) -> Any:
        return type("Encoded", (), {"input_ids": [int(word) for word in text.split()]})

    def decode(self, tokens: list[int], **options: Any) -> str:
        return "".join(f" {token}" for token in tokens)


@dataclass
class Local:
    """A server in this process."""

    engine: Counting
    client: httpx.AsyncClient
    task: "asyncio.Future[None]"
    url: str

    def ask(self, **options: Any) -> "asyncio.Task[httpx.Response]":
        body = {"model": "numbers", "prompt": "5", "max_tokens": 3} | options
        return asyncio.ensure_future(self.client.post("/v1/completions", json=body))

    async def load(self, *expected: int, steps: int = 0) -> None:
        """Wait until so many requests are open, and wait; the engine makes `steps` each time one looks."""
        for _ in range(1000):
            for _ in range(steps):
                self.engine.steps.release()
            health = (await self.client.get("/health")).json()
            if (health["open"], health["waiting"]) == expected:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{health}: {expected} expected")


def within(
    slots: int, waiting: int, work: Callable[[Local], Coroutine[Any, Any, None]], breaks_at: int = 10**9
) -> None:
    """Run `work` beside a server with so many slots, and places to wait."""

    async def both() -> None:
        engine = Counting(slots)
        engine.breaks_at = breaks_at
        offer = Offer("numbers", lambda: Opened(Model("numbers", Numbers(), frozenset()), engine))
        models = Models([offer], Limits(10, 10**5), waiting)
        models.start(offer)
        service = Service(models)
        bound, ready = server.bind("127.0.0.1", 0), asyncio.Event()
        url = server.url(bound)
        task = asyncio.ensure_future(server._run(service, bound, ready.set))
        await ready.wait()
        try:
            async with httpx.AsyncClient(base_url=url, timeout=10) as client:
                await work(Local(engine, client, task, url))
        finally:
            if not task.done():
                os.kill(os.getpid(), signal.SIGTERM)
            engine.steps.release(10**6)
            await task

    with server._signals_end_it():
        asyncio.run(asyncio.wait_for(both(), 30))


def test_who_finds_no_place_is_told_to_come_again() -> None:
    async def work(local: Local) -> None:
        first = local.ask()
        await local.load(1, 0)
        second = local.ask(prompt="6")
        await local.load(1, 1)
        refused = await local.ask()
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        local.engine.steps.release(3)
        assert (await first).json()["choices"][0]["text"] == " 0 1 2"
        await local.load(1, 0)
        local.engine.steps.release(3)
        assert (await second).json()["choices"][0]["text"] == " 0 1 2"
        await local.load(0, 0)

    within(1, 1, work)


def test_new_requests_join_those_under_way_and_leave_before_them() -> None:
    async def work(local: Local) -> None:
        long = local.ask(max_tokens=1000)
        await local.load(1, 0)
        short = local.ask(max_tokens=10)
        await local.load(2, 0, steps=1)
        local.engine.steps.release(10)
        assert (await short).json()["usage"]["completion_tokens"] == 10
        assert not long.done()
        local.engine.steps.release(1000)
        assert (await long).json()["usage"]["completion_tokens"] == 1000

    within(2, 1, work)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_gives_back_slot_and_place(stream: bool) -> None:
    async def work(local: Local) -> None:
        one = local.ask(stream=stream, max_tokens=10**5)
        await local.load(1, 0)
        two = local.ask(stream=stream)
        await local.load(1, 1)
        two.cancel()
        await local.load(1, 0, steps=1)
        one.cancel()
        await local.load(0, 0, steps=1)
        assert local.engine.tokens == {}

    within(1, 1, work)


async def lines(response: httpx.Response) -> AsyncIterator[Any]:
    async for line in response.aiter_lines():
        if line and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def test_endless_streams_are_cut_off_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GRACE", 0.3)

    async def work(local: Local) -> None:
        local.engine.steps.release(3)
        body = {"model": "numbers", "prompt": "5", "max_tokens": 10**5, "stream": True}
        async with local.client.stream("POST", "/v1/completions", json=body) as response:
            events = lines(response)
            assert [(await anext(events))["choices"][0]["text"] for _ in range(3)] == [" 0", " 1", " 2"]
            whole = local.ask(max_tokens=10**5)
            await local.load(1, 1)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.35)
            local.engine.steps.release(5)
            rest = [event async for event in events]
            assert rest[-1]["error"]["message"] == "the server is shutting down"
            assert (await whole).status_code == 503
        await local.task

    within(1, 1, work)


def test_a_step_that_fails_ends_its_requests_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def work(local: Local) -> None:
        local.engine.steps.release(100)
        body = {"model": "numbers", "prompt": "5", "max_tokens": 10, "stream": True}
        async with local.client.stream("POST", "/v1/completions", json=body) as response:
            events = [event async for event in lines(response)]
        assert [event["choices"][0]["text"] for event in events[:5]] == [" 0", " 1", " 2", " 3", " 4"]
        assert events[5]["error"]["code"] == "engine_failed"
        answer = await local.ask(max_tokens=10)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert (await local.ask(max_tokens=3)).json()["choices"][0]["text"] == " 0 1 2"
        health = (await local.client.get("/health")).json()
        assert (health["open"], health["failures"]) == (0, 2)

    within(2, 1, work, breaks_at=5)
    assert "RuntimeError: the engine is broken" in caplog.text


def test_a_request_that_the_engine_cannot_open_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_or_break(engine: Counting, prompt: Sequence[int], sampling: Sampling) -> int:
        if prompt == [6]:
            raise ValueError("no memory")
        return opened(engine, prompt, sampling)

    opened = Counting.open
    monkeypatch.setattr(Counting, "open", open_or_break)

    async def work(local: Local) -> None:
        first = local.ask()
        await local.load(1, 0)
        second = local.ask(prompt="6")
        local.engine.steps.release(9)
        assert (await second).status_code == 500
        assert (await first).json()["choices"][0]["text"] == " 0 1 2"

    within(2, 1, work)


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wrinklefree.serve.app.BODY_SECONDS", 0.2)

    async def work(local: Local) -> None:
        host, port = local.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        writer.write(head + b"Content-Length: 50\r\n\r\n{")
        assert b" 408 " in await reader.readline()
        assert (await reader.read()).count(b"did not come")  # and it is closed
        writer.close()
        await writer.wait_closed()

    within(1, 1, work)


def test_without_a_template_chat_is_refused() -> None:
    async def work(local: Local) -> None:
        body = {"model": "numbers", "messages": [{"role": "user", "content": "5"}]}
        answer = await local.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert "no chat template: use /v1/completions" in answer.json()["error"]["message"]

    within(1, 1, work)
