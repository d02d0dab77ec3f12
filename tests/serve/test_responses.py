"""OpenAI's own client talks to `/v1/responses`, whole and streamed."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from test_scoring import Served, served  # noqa: F401  # the fixture: both engines in this process


def with_client(served: Served, work: Callable[[AsyncOpenAI], Awaitable[Any]]) -> Any:  # noqa: F811
    async def run() -> Any:
        inside = httpx.AsyncClient(transport=httpx.ASGITransport(served.service.app()))
        async with AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=inside) as client:
            return await work(client)

    return asyncio.run(run())


def test_a_response_is_what_the_chat_says(served: Served) -> None:  # noqa: F811
    settings: Any = {"model": "m", "temperature": 0, "max_output_tokens": 8}
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hey"}]
    expected = served.choices("chat/completions", messages=turns)[0]["message"]["content"]
    whole = with_client(served, lambda c: c.responses.create(input="hey", instructions="Be short.", **settings))
    assert (whole.output_text, whole.status) == (expected, "incomplete")
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.output_tokens == 8
    listed = with_client(served, lambda c: c.responses.create(input=turns, store=False, user="me", **settings))
    assert listed.output_text == expected
    again = [
        *turns,
        *[item.model_dump(exclude_none=True) for item in listed.output],
        {"role": "user", "content": "more"},
    ]
    assert with_client(served, lambda c: c.responses.create(input=again, **settings)).output_text


def test_a_response_is_streamed_in_named_events(served: Served) -> None:  # noqa: F811
    async def read(client: AsyncOpenAI) -> list[Any]:
        stream = await client.responses.create(model="m", input="hey", temperature=0, max_output_tokens=8, stream=True)
        return [event async for event in stream]

    events = with_client(served, read)
    whole = served.choices("chat/completions", messages=[{"role": "user", "content": "hey"}])[0]["message"]["content"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")
    assert events[-1].response.output_text == whole


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": []}, "input"),
        ({"input": [{"role": "king", "content": "a"}]}, "input.0.role"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"temperature": 3}, "temperature"),
    ],
)
def test_what_a_response_cannot_be_is_refused_by_name(served: Served, fields: Any, param: str) -> None:  # noqa: F811
    answer = served.ask("responses", **({"temperature": 1, "max_tokens": None, "input": "hey"} | fields))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
