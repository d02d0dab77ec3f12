"""Several models behind one server: which are open, and whose memory is given to another."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import PROMPT, served

from wrinklefree.commands.serve import _names
from wrinklefree.core.errors import UserError
from wrinklefree.engine.engine import Engine
from wrinklefree.engine.sampling import Sampling
from wrinklefree.generate.open import open_engine
from wrinklefree.serve.app import Service
from wrinklefree.serve.memory import needed
from wrinklefree.serve.models import Limits, Model, Models, Offer, Opened


class Words:
    """A tokenizer of one token."""

    chat_template = None

    def __call__(self, text: str, **options: Any) -> Any:
        return type("Encoded", (), {"input_ids": [1]})

    def decode(self, tokens: list[int], **options: Any) -> str:
        return "x" * len(tokens)


class Gated:
    """An engine whose sequences end after one step, which waits for `gate`."""

    context, slots, vocab = 100, 2, 10

    def __init__(self, gate: threading.Event) -> None:
        self.gate, self.open_slots = gate, set[int]()

    def open(self, prompt: Sequence[int], sampling: Sampling) -> int:
        slot = min({0, 1} - self.open_slots)
        self.open_slots.add(slot)
        return slot

    def step(self) -> dict[int, int]:
        assert self.gate.wait(10)
        return dict.fromkeys(self.open_slots, 1)

    def finished(self, slot: int) -> str:
        return "length"

    def close(self, slot: int) -> None:
        self.open_slots.remove(slot)

    def reset(self) -> None:
        self.open_slots.clear()


class Shelf:
    """A service with models of given sizes, which counts how often each was opened."""

    def __init__(self, sizes: dict[str, int], most: int | None, told: int | None = None) -> None:
        self.opened = dict.fromkeys(sizes, 0)
        self.gate = threading.Event()
        self.gate.set()
        offers = [Offer(name, self._opener(name, size), told or size) for name, size in sizes.items()]
        self.models = Models(offers, Limits(50, 50), 10, most)
        self.app = Service(self.models).app()

    def _opener(self, name: str, size: int) -> Callable[[], Opened]:
        def open_it() -> Opened:
            self.opened[name] += 1
            if name == "broken":
                raise UserError("its weights are gone")
            return Opened(Model(name, Words(), frozenset(), f"engine of {name}"), Gated(self.gate), size)

        return open_it

    def run(self, work: Callable[[httpx.AsyncClient], Any]) -> None:
        async def inside() -> None:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                await work(client)

        try:
            asyncio.run(asyncio.wait_for(inside(), 20))
        finally:
            self.gate.set()
            self.models.close()
            self.models.join()

    def open(self) -> list[str]:
        return [state["id"] for state in self.models.states() if state["open"]]


async def ask(client: httpx.AsyncClient, model: str) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": model, "prompt": "a", "max_tokens": 1})


def test_models_are_opened_when_they_are_asked_for_and_the_longest_unused_is_closed() -> None:
    shelf = Shelf({"a": 4, "b": 4, "c": 4}, most=8)

    async def work(client: httpx.AsyncClient) -> None:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["a", "b", "c"]
        assert shelf.open() == []
        for name, expected in [("a", ["a"]), ("b", ["a", "b"]), ("a", ["a", "b"]), ("c", ["a", "c"])]:
            answer = (await ask(client, name)).json()
            assert (answer["model"], answer["choices"][0]["text"]) == (name, "x")
            assert shelf.open() == expected
        assert shelf.opened == {"a": 1, "b": 1, "c": 1}
        await ask(client, "b")
        assert (shelf.open(), shelf.opened["b"]) == (["b", "c"], 2)
        assert "wf_requests_total 5\n" in (await client.get("/metrics")).text  # those of closed models count
        health = (await client.get("/health")).json()
        assert (health["engine"], health["slots"]) == ("engine of b", 4)
        refused = await ask(client, "d")
        assert refused.json()["error"]["message"] == "there is no model 'd' here, only 'a', 'b', 'c'"

    shelf.run(work)


def test_a_model_that_answers_is_not_closed() -> None:
    shelf = Shelf({"a": 4, "b": 4}, most=4)

    async def work(client: httpx.AsyncClient) -> None:
        shelf.gate.clear()
        busy = asyncio.ensure_future(ask(client, "a"))
        while not shelf.models.load()["open"]:
            await asyncio.sleep(0.01)
        refused = await ask(client, "b")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "no room for 'b'" in refused.text
        shelf.gate.set()
        assert (await busy).status_code == 200
        assert (await ask(client, "b")).status_code == 200
        assert shelf.open() == ["b"]

    shelf.run(work)


def test_what_a_model_really_takes_counts_once_it_is_open() -> None:
    shelf = Shelf({"a": 6, "b": 6}, most=8, told=1)

    async def work(client: httpx.AsyncClient) -> None:
        for name in ("a", "b", "a"):
            assert (await ask(client, name)).status_code == 200
            assert shelf.open() == [name]

    shelf.run(work)


def test_two_requests_open_a_model_once() -> None:
    shelf = Shelf({"a": 4}, most=None)

    async def work(client: httpx.AsyncClient) -> None:
        answers = await asyncio.gather(*(ask(client, "a") for _ in range(5)))
        assert [answer.status_code for answer in answers] == [200] * 5
        assert shelf.opened == {"a": 1}

    shelf.run(work)


def test_a_model_that_cannot_be_opened_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf({"a": 4, "broken": 4}, most=None)

    async def work(client: httpx.AsyncClient) -> None:
        answer = await ask(client, "broken")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_failed")
        assert "its weights are gone" not in answer.text  # paths are for the log
        assert (await ask(client, "a")).status_code == 200

    shelf.run(work)
    assert "broken cannot be opened: its weights are gone" in caplog.text


def test_what_is_needed_is_about_what_the_engine_then_takes(folder: Path) -> None:
    need = needed(folder, True, 3, 200, False, False)
    engine = open_engine(str(folder), "native", threads=1, slots=3, context=200)[0]
    assert isinstance(engine, Engine)
    assert need.weights == pytest.approx(engine.weight_bytes(), rel=0.2)
    before = engine.bytes()
    for slot in range(3):
        engine.open([slot + 1] * 199, Sampling(1))
    while engine.step() or any(slot.open and not slot.open.finished for slot in engine._slots):
        pass
    assert need.cache == engine.bytes() - before


def test_names() -> None:
    assert _names(["a/packed", "b/packed"], []) == ["a", "b"]
    assert _names(["a/packed", "b/packed"], ["x"]) == ["x", "b"]
    with pytest.raises(UserError, match="two models are called a: give one --name for each model"):
        _names(["a/packed", "b/../a/packed"], [])
    with pytest.raises(UserError, match="--name y: 2 names for 1 models"):
        _names(["a"], ["x", "y"])


def test_the_command_serves_two(folder: Path) -> None:
    options = ["--threads", "1", "--name", "one", "--name", "two", "--max-concurrent", "2", "--max-memory", "1GB"]
    with served(folder, str(folder), *options) as process, process.client() as client:
        assert "serving one, two at " in process.announced
        assert [model.id for model in client.models.list()] == ["one", "two"]
        texts = [
            client.completions.create(model=name, prompt=PROMPT, max_tokens=9, temperature=0).choices[0].text
            for name in ("one", "two", "one")
        ]
        assert texts[0] == texts[1] == texts[2] != ""
        assert [state["open"] for state in process.health()["models"]] == [True, True]
        with pytest.raises(openai.NotFoundError, match="no model 'three' here, only 'one', 'two'"):
            client.models.retrieve("three")
