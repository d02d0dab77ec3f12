"""The endpoint: what OpenAI's client asks and gets, in real processes; and limits, on an engine that the test steps."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI

from wrinklefree.commands.serve import model_name
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantMethod, find
from wrinklefree.engine.engine import Engine, Sampling
from wrinklefree.export.formats.packed import export_packed
from wrinklefree.generate import generate
from wrinklefree.generate.open import open_engine
from wrinklefree.models.load import load_model
from wrinklefree.serve import server
from wrinklefree.serve.app import Limits, Model, Service
from wrinklefree.serve.fallback import TransformersEngine
from wrinklefree.serve.scheduler import Scheduler

torch.set_num_threads(1)

PROMPT = "def main(arguments):\n"
LONGEST = 128  # tokens of prompts, and of answers
LINUX = sys.platform == "linux"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in ternary, untrained, packed."""
    out = tmp_path_factory.mktemp("serve") / "toy" / "packed"
    model, words = load_model("builtin:tiny", dtype=torch.float32)
    method = find("bitdistill")(name="bitdistill")
    assert isinstance(method, QuantMethod)
    ids = words(PROMPT, return_tensors="pt").input_ids
    export_packed(method.prepare(model), words, method, out, card="", force=False, batches=[{"input_ids": ids}])
    return out


@dataclass
class Process:
    """`wf serve` and its address."""

    popen: subprocess.Popen[str]
    url: str
    announced: str

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)

    def health(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/health").json()

    def is_idle(self) -> bool:
        health = self.health()
        return health["open"] == health["waiting"] == 0

    def end(self, number: int) -> tuple[int, str]:
        """Exit code, and what it said last."""
        self.popen.send_signal(number)
        assert self.popen.stderr is not None
        return self.popen.wait(timeout=15), self.popen.stderr.read()


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "wrinklefree.cli", "serve", str(folder), "--port", "0", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert popen.stderr is not None
        line = popen.stderr.readline()
        found = re.search(r"at (http://\S+)/v1 ", line)
        assert found, line + popen.stderr.read()
        yield Process(popen, found[1], line)
    finally:
        popen.kill()
        popen.wait()
        popen.stderr.close()


@pytest.fixture(scope="module")
def process(folder: Path) -> Iterator[Process]:
    limits = {"prompt-tokens": LONGEST, "tokens": LONGEST, "concurrent": 4, "waiting": 300}
    with served(
        folder, "--threads", "1", *(word for k, v in limits.items() for word in (f"--max-{k}", str(v)))
    ) as made:
        yield made
        assert made.end(signal.SIGINT) == (0, "")


@pytest.fixture(scope="module")
def client(process: Process) -> Iterator[OpenAI]:
    with process.client() as made:
        yield made


@pytest.fixture(scope="module")
def local(folder: Path) -> tuple[Any, Any]:
    """What `wf generate` would run on the folder."""
    model, words, _ = open_engine(str(folder), threads=1)
    return model, words


def said(client: OpenAI, prompt: Any = PROMPT, **options: Any) -> str:
    options = {"temperature": 0, "max_tokens": 40} | options
    return client.completions.create(model="toy", prompt=prompt, **options).choices[0].text


def streamed(client: OpenAI, **options: Any) -> tuple[str, str | None, Any]:
    """Text, why it ended, and usage."""
    options = {"temperature": 0, "max_tokens": 40, "prompt": PROMPT} | options
    pieces, finish, usage = [], None, None
    with client.completions.create(model="toy", stream=True, **options) as chunks:
        for chunk in chunks:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                pieces.append(choice.text)
                finish = choice.finish_reason or finish
    return "".join(pieces), finish, usage


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_it_says_in_one_line_what_it_serves_and_how_to_ask(process: Process) -> None:
    assert "serving toy at " in process.announced
    assert "engine: " in process.announced
    for limit in ("4 at once", "300 more may wait", f"prompts up to {LONGEST} tokens, answers up to {LONGEST}"):
        assert limit in process.announced
    command = process.announced.split("Try: ")[1].strip()
    answer = subprocess.run(["bash", "-c", f"{command} --silent"], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["choices"][0]["text"]


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError, match="'other' is not here; 'toy' is"):
        client.models.retrieve("other")


def test_greedy_text_is_that_of_generate(client: OpenAI, local: tuple[Any, Any]) -> None:
    expected = generate.complete(*local, PROMPT, 40)
    answer = client.completions.create(model="toy", prompt=PROMPT, max_tokens=40, temperature=0)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == expected != ""
    assert answer.choices[0].finish_reason == "length"
    prompt = local[1](PROMPT).input_ids
    usage = {"prompt_tokens": len(prompt), "completion_tokens": 40, "total_tokens": len(prompt) + 40}
    assert answer.usage is not None
    assert {name: vars(answer.usage)[name] for name in usage} == usage
    assert said(client, prompt) == said(client, [PROMPT]) == expected
    text, finish, counted = streamed(client, stream_options={"include_usage": True})
    assert (text, finish, counted.total_tokens) == (expected, "length", len(prompt) + 40)
    assert streamed(client)[2] is None


def test_chat_is_that_of_reply(client: OpenAI, local: tuple[Any, Any]) -> None:
    expected = generate.reply(*local, "Say\nit", 30, temperature=0)
    parts = [{"type": "text", "text": "Say\n"}, {"type": "text", "text": "it"}]
    for content in ("Say\nit", parts):
        for limit in ("max_tokens", "max_completion_tokens"):
            options: dict[str, Any] = {"model": "toy", "temperature": 0, limit: 30}
            options["messages"] = [{"role": "user", "content": content}]
            message = client.chat.completions.create(**options).choices[0].message
            assert (message.role, message.content) == ("assistant", expected)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert len({chunk.id for chunk in chunks}) == 1


def test_an_answer_may_come_back_as_a_turn(client: OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": "a"}]
    first = client.chat.completions.create(model="toy", messages=turns, max_tokens=5, temperature=0)
    turns += [first.choices[0].message.model_dump(), {"role": "user", "content": "b"}]
    again = client.chat.completions.create(model="toy", messages=turns, max_tokens=5, temperature=0)
    assert again.usage is not None
    assert first.usage is not None
    assert again.usage.prompt_tokens > first.usage.prompt_tokens


def test_seeds(client: OpenAI) -> None:
    hot = {"temperature": 1.0, "max_tokens": 30}
    same = [said(client, seed=seed, **hot) for seed in (1, 1, 2, -1, 2**64 - 1)]
    assert same[0] == same[1] != same[2]
    assert same[3] == same[4]
    assert said(client, **hot) != said(client, **hot)
    assert streamed(client, seed=1, **hot)[0] == same[0]
    assert said(client, seed=1, temperature=1.0, extra_body={"top_k": 1}) == said(client)


def test_characters_come_whole_and_no_space_is_lost(client: OpenAI, local: tuple[Any, Any]) -> None:
    """Nearly random tokens, which are bytes or begin with a space."""
    model, words = local
    engine = model if isinstance(model, Engine) else TransformersEngine(model, 256, 1)
    for seed in range(4):
        settings = Sampling(100, temperature=2.0, seed=seed, stop_tokens=frozenset(words.all_special_ids))
        tokens = run_alone(engine, words(PROMPT).input_ids, settings)
        expected = words.decode(tokens, skip_special_tokens=True)
        hot = {"temperature": 2.0, "seed": seed, "max_tokens": len(tokens)}
        text, _, _ = streamed(client, **hot)
        assert text == said(client, **hot) == expected


def run_alone(engine: Any, prompt: list[int], settings: Sampling) -> list[int]:
    slot, tokens = engine.open(prompt, settings), []
    while engine.finished(slot) is None:
        tokens += engine.step().values()
    engine.close(slot)
    return tokens


def test_stop_strings_end_the_text_before_them_wherever_tokens_end(client: OpenAI) -> None:
    whole = said(client)
    for start in range(3, len(whole) - 6, 7):
        stop = whole[start : start + 5]
        expected = whole[: whole.index(stop)]
        assert said(client, stop=stop) == said(client, stop=["never", stop]) == expected
        text, finish, _ = streamed(client, stop=stop)
        assert (text, finish) == (expected, "stop")
    assert streamed(client, stop=f"{whole[-3:]}never")[:2] == (whole, "length")


def test_requests_at_the_same_time_get_what_they_get_alone(client: OpenAI) -> None:
    prompts = [f"def f{i}(" for i in range(12)]
    alone = [said(client, prompt) for prompt in prompts]
    together: dict[str, str] = {}
    threads = [threading.Thread(target=lambda p=p: together.update({p: said(client, p)})) for p in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[prompt] for prompt in prompts] == alone


ODD: list[tuple[str, Any]] = [
    ("n", 2),
    ("n", True),
    ("best_of", 3),
    ("echo", True),
    ("logprobs", 0),
    ("logprobs", 5),
    ("suffix", "end"),
    ("logit_bias", {"1": 5}),
    ("presence_penalty", 0.5),
    ("frequency_penalty", -1),
    ("tools", [{"type": "function"}]),
    ("response_format", {"type": "json_object"}),
    ("nonsense", 1),
    ("temperature", -0.1),
    ("temperature", 2.5),
    ("temperature", "1"),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -1),
    ("max_tokens", 0),
    ("max_tokens", 1.5),
    ("max_tokens", LONGEST + 1),
    ("max_tokens", True),
    ("seed", 2**65),
    ("stop", ""),
    ("stop", ["a"] * 5),
    ("stop", "a" * 1000),
    ("stop", [1]),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", ["a", "b"]),
    ("prompt", [-1]),
    ("prompt", [10**9]),
    ("prompt", [1.5]),
    ("prompt", {"text": "a"}),
    ("prompt", "many words " * LONGEST),
    ("prompt", [1] * (LONGEST + 1)),
    ("model", 5),
]


@pytest.mark.parametrize(("field", "value"), ODD, ids=lambda value: str(value)[:20])
def test_what_cannot_be_done_is_refused_by_its_name(process: Process, field: str, value: Any) -> None:
    body = {"model": "toy", "prompt": "a", "max_tokens": 2} | {field: value}
    answer = httpx.post(f"{process.url}/v1/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"].split(".")[0] == field
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "king", "content": "a"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages.0.content.0.type"),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "messages.1.role"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{}]}], "messages.0.tool_calls"),
        ([{"role": "user", "content": "many words " * LONGEST}], "messages"),
    ],
)
def test_messages_that_cannot_be_read_are_refused_by_their_place(process: Process, messages: Any, param: str) -> None:
    answer = httpx.post(f"{process.url}/v1/chat/completions", json={"model": "toy", "messages": messages})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_fields_that_ask_for_nothing_are_taken(client: OpenAI) -> None:
    neutral = {"n": 1, "echo": False, "presence_penalty": 0, "logit_bias": {}, "user": "me", "best_of": 1}
    assert said(client, **neutral) == said(client, extra_body={"logprobs": None, "metadata": {"a": "b"}})


def test_too_long_a_prompt_says_both_lengths(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=f"tokens, and this server takes {LONGEST}: shorten it") as caught:
        said(client, "many words " * LONGEST)
    assert caught.value.code == "context_length_exceeded"
    assert said(client, [1] * LONGEST, max_tokens=3)


def test_unknown_models_paths_and_verbs(process: Process, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'other' is not here"):
        client.completions.create(model="other", prompt="a")
    for verb, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405)):
        answer = httpx.request(verb, process.url + path)
        assert (answer.status_code, list(answer.json())) == (status, ["error"])


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b"\xff\xfe", b"[" * 60_000, b'{"a": NaN}', b'{"model": "\\ud800"}', b"{}\0"]
)
def test_bodies_that_are_no_request(process: Process, body: bytes) -> None:
    answer = httpx.post(f"{process.url}/v1/completions", content=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_damaged_bodies_never_break_it(process: Process) -> None:
    random.seed(0)
    good = json.dumps({"model": "toy", "prompt": "dé", "max_tokens": 2, "stop": ["x"], "seed": 3}).encode()
    codes = []
    with httpx.Client(base_url=process.url) as client:
        for _ in range(200):
            body = bytearray(good)
            for _ in range(random.randint(1, 3)):
                at, kind = random.randrange(len(body)), random.randrange(3)
                body[at : at + (kind < 2)] = bytes(random.randrange(256) for _ in range(kind > 0))
            path = random.choice(["/v1/completions", "/v1/chat/completions"])
            codes.append(client.post(path, content=bytes(body)).status_code)
    assert set(codes) <= {200, 400, 404}
    assert codes.count(400) > 50
    until(process.is_idle)


def test_a_body_that_is_too_long_is_refused_unread(process: Process) -> None:
    most = Limits(LONGEST, LONGEST).body
    for content in (b"x" * (most + 1), (b"x" * 1000 for _ in range(most // 1000 + 1))):
        answer = httpx.post(f"{process.url}/v1/completions", content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


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
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
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


def test_a_half_cache_reaches_the_engine(folder: Path) -> None:
    engines = [open_engine(str(folder), threads=1, half_cache=half)[0] for half in (False, True)]
    grown = []
    for engine in engines:
        before = engine.bytes()
        engine.open([1, 2, 3], Sampling(1))
        engine.step()
        grown.append(engine.bytes() - before)
    assert grown[0] == 2 * grown[1] > 0


def test_a_signal_ends_it_with_streams_open(folder: Path) -> None:
    """On transformers, with a key."""
    options = ["--engine", "transformers", "--api-key", "secret", "--max-concurrent", "2", "--name", "own"]
    with served(folder, *options) as process:
        assert "slow: one sequence after the other" in process.announced
        with process.client() as stranger, pytest.raises(openai.AuthenticationError, match="no valid API key"):
            stranger.models.list()
        model, words = load_model(folder, dtype=torch.float32)
        asked: dict[str, Any] = {"model": "own", "prompt": PROMPT}
        with OpenAI(base_url=f"{process.url}/v1", api_key="secret", max_retries=0) as client:
            answer = client.completions.create(**asked, max_tokens=10, temperature=0)
            assert answer.choices[0].text == generate.complete(model, words, PROMPT, 10)
            streams = [client.completions.create(**asked, max_tokens=200, stream=True) for _ in range(2)]
            for stream in streams:
                next(stream)
            start = time.monotonic()
            assert process.end(signal.SIGTERM) == (0, "")
            assert time.monotonic() - start < server.GRACE + 4
            for stream in streams:
                assert last_of(stream) in ("length", "stop", "the server is shutting down")
                stream.close()


def last_of(stream: Any) -> str | None:
    """How a stream ends."""
    try:
        return [chunk.choices[0].finish_reason for chunk in stream][-1]
    except openai.APIError as error:
        return error.message


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


class Numbers:
    """A tokenizer whose tokens are numbers."""

    chat_template = None

    def __call__(self, text: str) -> Any:
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
        model = Model("numbers", Numbers(), frozenset())
        service = Service(model, Scheduler(engine, waiting), Limits(10, 10**5))
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


def test_an_engine_that_breaks_ends_the_server_and_its_streams() -> None:
    async def work(local: Local) -> None:
        local.engine.steps.release(9)
        answer = await local.ask(max_tokens=10)
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")

    with pytest.raises(RuntimeError, match="the engine is broken"):
        within(1, 1, work, breaks_at=5)


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wrinklefree.serve.app.BODY_SECONDS", 0.2)

    async def work(local: Local) -> None:
        host, port = local.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{")
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


def test_addresses_that_cannot_be_had_are_mistakes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port}: .*another --port may be free"):
            server.bind("127.0.0.1", port)


def test_a_missing_extra_is_a_line(folder: Path) -> None:
    code = "import sys; sys.modules['uvicorn'] = None; from wrinklefree.cli import main; main(['serve', 'x'])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: wf serve needs two more libraries: pip install 'wrinklefree[serve]'\n"


@pytest.mark.parametrize(
    ("path", "name"), [("a/run/packed", "run"), ("a/run/final/", "run"), ("a/own", "own"), ("org/model", "model")]
)
def test_a_model_is_called_what_its_folder_is(path: str, name: str) -> None:
    assert model_name(path) == name
