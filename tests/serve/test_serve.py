"""The endpoint answers OpenAI's client with the text that `wf generate` has, and starts and ends as it says."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from serving import LONGEST, PROMPT, Process, said, served, streamed

from wrinklefree.commands.serve import model_name
from wrinklefree.core.errors import UserError
from wrinklefree.engine.engine import Engine
from wrinklefree.engine.sampling import Sampling
from wrinklefree.generate import generate
from wrinklefree.generate.open import open_engine
from wrinklefree.models.load import load_model
from wrinklefree.serve import server
from wrinklefree.serve.fallback import TransformersEngine


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
    with pytest.raises(openai.NotFoundError, match="no model 'other' here, only 'toy'"):
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
            assert time.monotonic() - start < server.GRACE + 30  # a busy machine takes its time to end a process
            for stream in streams:
                assert last_of(stream) in ("length", "stop", "the server is shutting down")
                stream.close()


def last_of(stream: Any) -> str | None:
    """How a stream ends."""
    try:
        return [chunk.choices[0].finish_reason for chunk in stream][-1]
    except openai.APIError as error:
        return error.message


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
