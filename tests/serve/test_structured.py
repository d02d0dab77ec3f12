"""Answers follow a JSON schema, whatever the model: here one of random weights."""

import asyncio
import json
from typing import Any, Literal

import httpx
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel
from test_scoring import Served, served  # noqa: F401  # the fixture: both engines in this process

from wrinklefree.serve.structured import closed

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "who": {"enum": ["me", "you"]}},
    "required": ["n", "who"],
    "additionalProperties": False,
}
LONG = {"prompt": "x", "max_tokens": 100, "temperature": 1.0}


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}}


@pytest.mark.parametrize("seed", range(4))
def test_answers_follow_the_schema_and_end_by_themselves(served: Served, seed: int) -> None:  # noqa: F811
    for choice in served.choices(**LONG, **form(SCHEMA), n=2, seed=seed):
        found = json.loads(choice["text"])
        assert found.keys() == {"n", "who"}
        assert found["n"] in range(100)
        assert found["who"] in ("me", "you")
        assert choice["finish_reason"] == "stop"


def test_an_answer_that_is_cut_off_begins_as_the_schema_wants(served: Served) -> None:  # noqa: F811
    (choice,) = served.choices(prompt="x", max_tokens=2, **form(SCHEMA))
    assert '{"n": '.startswith(choice["text"]) or choice["text"].startswith('{"n": ')
    assert choice["finish_reason"] == "length"


def test_json_object_gives_an_object_in_chats_and_streams(served: Served) -> None:  # noqa: F811
    fields = {"response_format": {"type": "json_object"}, "logit_bias": {str(served.tokenizer("}").input_ids[-1]): 20}}
    messages = [{"role": "user", "content": "hey"}]
    (chat,) = served.choices("chat/completions", messages=messages, max_tokens=60, **fields)
    assert isinstance(json.loads(chat["message"]["content"]), dict)
    parts = served.events(prompt="x", max_tokens=60, **fields)
    assert isinstance(json.loads("".join(part["choices"][0]["text"] for part in parts)), dict)
    plain = served.choices(prompt="x", response_format={"type": "text"})
    assert plain == served.choices(prompt="x")


def test_schemas_of_pydantic_work(served: Served) -> None:  # noqa: F811
    class Inner(BaseModel, extra="forbid"):
        on: bool

    class Outer(BaseModel, extra="forbid"):
        parts: list[Inner]
        kind: str | None

    schema = Outer.model_json_schema()
    schema["properties"]["parts"] |= {"minItems": 2, "maxItems": 2}
    schema["properties"]["kind"] = {"anyOf": [{"const": "a"}, {"type": "null"}]}
    (choice,) = served.choices(**LONG, **form(schema), seed=1)
    assert len(Outer.model_validate_json(choice["text"]).parts) == 2


def test_a_schema_that_is_none_is_refused(served: Served) -> None:  # noqa: F811
    for schema in ({"type": "nonsense"}, {"$ref": "https://example.com/schema"}):
        answer = served.ask(prompt="x", **form(schema))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")


class City(BaseModel, extra="forbid"):
    name: Literal["Rome", "Oslo"]
    coast: bool


def test_parse_of_openai_gives_an_object(served: Served) -> None:  # noqa: F811
    async def parsed() -> City | None:
        inside = httpx.AsyncClient(transport=httpx.ASGITransport(served.service.app()))
        async with AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=inside) as client:
            turns: Any = [{"role": "user", "content": "Which city?"}]
            answer = await client.chat.completions.parse(model="m", messages=turns, response_format=City, max_tokens=80)
            return answer.choices[0].message.parsed

    assert isinstance(asyncio.run(parsed()), City)


def test_objects_have_no_properties_but_those_that_the_schema_names(served: Served) -> None:  # noqa: F811
    inner = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    open_schema = {"type": "object", "properties": {"n": {"type": "boolean"}, "in": inner}, "required": ["n", "in"]}
    for seed in range(3):
        (choice,) = served.choices(**LONG, **form(open_schema), seed=seed)
        assert choice["finish_reason"] == "stop"
        found = json.loads(choice["text"])
        assert (found.keys(), found["in"].keys()) == ({"n", "in"}, {"a"})


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {}}, "additionalProperties": {"type": "string"}},
        {"properties": {"a": {}}, "required": ["b"]},
        {"type": "object"},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"properties": {"a": {}}, "anyOf": [{"required": ["b"]}]},
        {"enum": [{"properties": {"a": 1}}]},
    ],
)
def test_schemas_that_say_what_others_are_or_are_put_together_stay_as_they_are(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema


def test_a_reference_with_a_description_is_that_reference() -> None:
    """As generators of schemas write it that may put nothing beside a `$ref`."""
    named = {"allOf": [{"$ref": "#/$defs/A"}], "description": "it", "default": {}}
    one = {"properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    whole = {"properties": {"n": named}, "required": ["n"], "$defs": {"A": one}}
    found = closed(whole)
    assert found["properties"]["n"] == {"$ref": "#/$defs/A", "description": "it", "default": {}}
    assert found["additionalProperties"] is found["$defs"]["A"]["additionalProperties"] is False


def test_a_property_may_have_the_name_of_a_keyword() -> None:
    inner = {"type": "object", "properties": {"a": {"type": "boolean"}}}
    for name in ("default", "enum", "required", "properties"):
        found = closed({"type": "object", "properties": {name: inner}})
        assert found["properties"][name]["additionalProperties"] is False
