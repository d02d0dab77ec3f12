"""OpenAI's own client talks to `/v1/responses`, whole and streamed."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, Literal

import httpx
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel
from test_scoring import Served, served  # noqa: F401  # the fixture: both engines in this process

from wrinklefree.serve import responses, schema
from wrinklefree.serve.tools import tools_of

PLACE = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
PLACE["additionalProperties"] = False
WEATHER = {"type": "function", "name": "weather", "description": "of a city", "parameters": PLACE, "strict": True}


class City(BaseModel, extra="forbid"):
    name: Literal["Rome", "Oslo"]
    coast: bool


def with_client(served: Served, work: Callable[[AsyncOpenAI], Awaitable[Any]]) -> Any:  # noqa: F811
    async def run() -> Any:
        inside = httpx.AsyncClient(transport=httpx.ASGITransport(served.service.app()))
        async with AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=inside) as client:
            return await work(client)

    return asyncio.run(run())


def fake_answer(said: str) -> Any:
    """An answer that has ended."""
    return SimpleNamespace(said=said, finish="stop", tokens=3, stream=SimpleNamespace(prompt=[1, 2]))


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


def test_parse_gives_an_object_whole_and_streamed(served: Served) -> None:  # noqa: F811
    pytest.importorskip("llguidance")
    asked: Any = {"model": "m", "input": "Which city?", "text_format": City, "max_output_tokens": 80}

    async def streamed(client: AsyncOpenAI) -> Any:
        async with client.responses.stream(**asked) as events:
            pieces = [event.delta async for event in events if event.type == "response.output_text.delta"]
            final = await events.get_final_response()
        assert "".join(pieces) == final.output_text
        return final

    for found in (with_client(served, lambda c: c.responses.parse(**asked)), with_client(served, streamed)):
        assert isinstance(found.output_parsed, City)
        assert found.status == "completed"


def test_a_function_is_called_whole_and_streamed_and_its_result_is_answered(served: Served) -> None:  # noqa: F811
    pytest.importorskip("llguidance")
    more: Any = {"model": "m", "tools": [WEATHER], "tool_choice": "required", "max_output_tokens": 80}
    asked: Any = {**more, "input": "Rain in Rome?"}
    names: list[str] = []

    async def streamed(client: AsyncOpenAI) -> Any:
        async with client.responses.stream(**asked) as events:
            names.extend([event.type async for event in events])
            return await events.get_final_response()

    for found in (with_client(served, lambda c: c.responses.parse(**asked)), with_client(served, streamed)):
        (call,) = found.output
        assert (call.type, call.name, found.status) == ("function_call", "weather", "completed")
        assert call.parsed_arguments == json.loads(call.arguments)
        assert call.parsed_arguments["city"] in ("Rome", "Oslo")
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "yes"}
        turns: Any = [{"role": "user", "content": "Rain in Rome?"}, *found.output, result]
        follow: Any = {"model": "m", "tools": [WEATHER], "input": turns, "temperature": 0, "max_output_tokens": 8}
        assert with_client(served, lambda c, follow=follow: c.responses.create(**follow)).output_text
    assert [name.removeprefix("response.") for name in names] == [
        *("created", "in_progress", "output_item.added"),
        *("function_call_arguments.delta", "function_call_arguments.done", "output_item.done", "completed"),
    ]


def test_calls_and_results_are_read_as_those_of_a_chat(served: Served) -> None:  # noqa: F811
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]}
    calls = [
        {"type": "function_call", "call_id": f"call_{i}", "name": "weather", "arguments": '{"city": "Rome"}'}
        for i in range(2)
    ]
    results = [{"type": "function_call_output", "call_id": f"call_{i}", "output": "yes"} for i in range(2)]
    first = {"role": "user", "content": "Rain?"}
    body = {"model": "m", "input": [first, said, *calls, *results], "tools": [WEATHER]}
    asked = schema.parse(responses.Asked, json.dumps(body).encode()).chat()
    user, assistant, *rest = asked.messages
    assert (user.content, assistant.content) == ("Rain?", "Let me see.")
    assert [call.id for call in assistant.tool_calls] == ["call_0", "call_1"]
    assert [(message.role, message.content) for message in rest] == [("tool", "yes")] * 2
    assert asked.tools[0].function.parameters == PLACE


@pytest.mark.parametrize("called", [True, False])
def test_text_before_a_call_is_an_item_of_its_own(called: bool) -> None:
    written = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    asked = schema.parse(responses.Asked, json.dumps({"model": "m", "input": "hey", "tools": [WEATHER]}).encode())
    envelope = responses.ResponseEnvelope(asked, tools_of(asked.chat()))
    whole = envelope.whole(fake_answer("Wait. " + written * called))
    assert [item["type"] for item in whole["output"]] == ["message"] + ["function_call"] * called
    assert whole["output"][0]["content"][0]["text"].strip() == "Wait."
    assert (whole["tools"], whole["tool_choice"]) == ([WEATHER], "auto")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": []}, "input"),
        ({"input": [{"role": "king", "content": "a"}]}, "input.0.role"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input.0"),
        ({"input": [{"type": "function_call_output", "call_id": "call_1", "output": "yes"}]}, "input.0.call_id"),
        ({"text": {"format": {"type": "json_schema", "name": "it"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "it", "schema": {"type": "odd"}}}}, "text.format"),
        ({"temperature": 3}, "temperature"),
        ({"include": ["message.output_text.logprobs"]}, "include.0"),
    ],
)
def test_what_a_response_cannot_be_is_refused_by_name(served: Served, fields: Any, param: str) -> None:  # noqa: F811
    answer = served.ask("responses", **({"temperature": 1, "max_tokens": None, "input": "hey"} | fields))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_what_changes_no_response_is_accepted(served: Served) -> None:  # noqa: F811
    more: dict[str, Any] = {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low"}}
    more |= {"verbosity": "low", "prompt_cache_retention": "24h"}
    answer = served.ask("responses", **({"temperature": 0, "max_tokens": None, "input": "hey"} | more))
    assert answer.status_code == 200
