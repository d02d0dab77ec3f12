"""What the endpoint cannot do is refused by its name, and no body, however damaged, breaks it."""

import json
import random
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from serving import LONGEST, Process, said, until

from wrinklefree.serve.models import Limits

JSON = {"Content-Type": "application/json"}

ODD: list[tuple[str, Any]] = [
    ("n", True),
    ("n", 0),
    ("n", 129),
    ("best_of", 0),
    ("echo", 1),
    ("logprobs", -1),
    ("logprobs", 21),
    ("logprobs", True),
    ("logit_bias", {"a": 5}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"100000000": 1}),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -3),
    ("min_p", 1.5),
    ("repetition_penalty", 1e39),
    ("prompt", ["a", ""]),
    ("prompt", [[1], []]),
    ("prompt", ["a"] * 129),
    ("suffix", "end"),
    ("functions", [{"name": "f"}]),
    ("response_format", {"type": "xml"}),
    ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}),
    ("nonsense", 1),
    ("temperature", -0.1),
    ("temperature", 2.5),
    ("temperature", "1"),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -1),
    ("max_tokens", 0),
    ("max_tokens", 1.5),
    ("max_tokens", True),
    ("seed", 2**65),
    ("stop", ["a"] * 17),
    ("stop", "a" * 1000),
    ("stop", [1]),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("prompt", ""),
    ("prompt", []),
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
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{"id": "a"}]}], "messages.0.tool_calls.0.function"),
        ([{"role": "user", "content": "many words " * LONGEST}], "messages"),
    ],
)
def test_messages_that_cannot_be_read_are_refused_by_their_place(process: Process, messages: Any, param: str) -> None:
    answer = httpx.post(f"{process.url}/v1/chat/completions", json={"model": "toy", "messages": messages})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_fields_that_ask_for_nothing_are_taken(client: OpenAI) -> None:
    neutral = {
        "n": 1,
        "stop": "",
        "echo": False,
        "presence_penalty": 0,
        "logit_bias": {},
        "user": "me",
        "best_of": 1,
    }
    assert said(client, **neutral) == said(client, extra_body={"logprobs": None, "metadata": {"a": "b"}})


def test_answers_past_the_limit_and_the_context_are_clipped(client: OpenAI) -> None:
    assert said(client, max_tokens=10**6) == said(client, max_tokens=LONGEST)


def test_too_long_a_prompt_says_both_lengths(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=f"tokens, but this server takes {LONGEST}: shorten it") as caught:
        said(client, "many words " * LONGEST)
    assert caught.value.code == "context_length_exceeded"
    assert said(client, [1] * LONGEST, max_tokens=3)


def test_unknown_models_paths_and_verbs(process: Process, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'other' here"):
        client.completions.create(model="other", prompt="a")
    for verb, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405)):
        answer = httpx.request(verb, process.url + path)
        assert (answer.status_code, list(answer.json())) == (status, ["error"])


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b"\xff\xfe", b"[" * 60_000, b'{"a": NaN}', b'{"model": "\\ud800"}', b"{}\0"]
)
def test_bodies_that_are_no_request(process: Process, body: bytes) -> None:
    answer = httpx.post(f"{process.url}/v1/completions", content=body, headers=JSON)
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
            codes.append(client.post(path, content=bytes(body), headers=JSON).status_code)
    assert set(codes) <= {200, 400, 404}
    assert codes.count(400) > 50
    until(process.is_idle)


def test_a_body_that_is_too_long_is_refused_unread(process: Process) -> None:
    most = Limits(LONGEST, LONGEST).body
    for content in (b"x" * (most + 1), (b"x" * 1000 for _ in range(most // 1000 + 1))):
        answer = httpx.post(f"{process.url}/v1/completions", content=content, headers=JSON)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
