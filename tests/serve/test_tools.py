"""Tools: shown to the model by its template or in words, called when they have to be, and read back."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from test_scoring import Served, served  # noqa: F401  # the fixture: both engines in this process

from wrinklefree.models.find import resolve_pretrained
from wrinklefree.models.load import open_tokenizer
from wrinklefree.serve import prompts, schema
from wrinklefree.serve.errors import ApiError
from wrinklefree.serve.tools import Tools, tools_of

PLACE = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
PLACE["additionalProperties"] = False
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": PLACE}}
NOW = {"type": "function", "function": {"name": "now"}}
ASKED = {"role": "user", "content": "Rain in Rome?"}
NAMED = {"type": "function", "function": {"name": "weather"}}
CALLED = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TURNS = [
    ASKED,
    {"role": "assistant", "tool_calls": [CALLED]},
    {"role": "tool", "content": "yes", "tool_call_id": "call_1"},
]


def chat(**fields: Any) -> schema.Chat:
    body = {"model": "m", "messages": [ASKED], "tools": [WEATHER, NOW]} | fields
    return schema.parse(schema.Chat, json.dumps(body).encode())


@pytest.mark.parametrize("choice", [NAMED, "required"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_has_to_be_made_is_made(served: Served, choice: Any, stream: bool) -> None:  # noqa: F811
    pytest.importorskip("llguidance")

    async def called() -> Any:
        inside = httpx.AsyncClient(transport=httpx.ASGITransport(served.service.app()))
        more: Any = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 80, "temperature": 1.0, "seed": 5}
        async with AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=inside) as client:
            if not stream:
                return (await client.chat.completions.create(model="m", messages=[ASKED], **more)).choices[0]
            async with client.chat.completions.stream(model="m", messages=[ASKED], **more) as events:
                return (await events.get_final_completion()).choices[0]

    found = asyncio.run(called())
    assert found.finish_reason == "tool_calls"
    (call,) = found.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")


TREE = {
    "$defs": {"kind": {"enum": ["oak", "elm"]}},
    "type": "object",
    "properties": {"k": {"$ref": "#/$defs/kind"}, "n": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
    "required": ["k", "n"],
}


def test_parameters_may_refer_to_their_own_definitions_and_to_themselves(served: Served) -> None:  # noqa: F811
    pytest.importorskip("llguidance")
    tools = [{"type": "function", "function": {"name": name, "parameters": TREE}} for name in ("a", "b")]
    # Whichever it likes better: so one of them is tried as the second alternative, too.
    for order in (tools, tools[::-1]):
        asked = {"messages": [ASKED], "tools": order, "tool_choice": "required", "max_tokens": 80, "temperature": 1.0}
        answers = [served.ask("chat/completions", **asked, seed=seed).json()["choices"][0] for seed in range(6)]
        messages = [answer["message"] for answer in answers if answer["finish_reason"] == "tool_calls"]
        assert messages
        for message in messages:  # others were cut off behind many trees
            tree = json.loads(message["tool_calls"][0]["function"]["arguments"])
            while tree is not None:
                assert (tree.keys(), tree["k"] in ("oak", "elm")) == ({"k", "n"}, True)
                tree = tree["n"]


@pytest.mark.parametrize("said", [{}, {"parameters": {}}, {"parameters": {"type": "object", "properties": {}}}])
def test_a_function_that_names_no_parameters_gets_none(served: Served, said: dict[str, Any]) -> None:  # noqa: F811
    pytest.importorskip("llguidance")
    tools = [{"type": "function", "function": {"name": "now", **said}}]
    asked = {"messages": [ASKED], "tools": tools, "tool_choice": "required", "max_tokens": 80}
    for seed in range(3):
        answer = served.ask("chat/completions", **asked, temperature=1.0, seed=seed).json()["choices"][0]
        assert [call["function"]["arguments"] for call in answer["message"]["tool_calls"]] == ["{}"]


def test_answers_that_clients_have_read_can_be_sent_back() -> None:
    """Openai's `parse` puts objects beside texts, and calls that are put together from a stream keep their index."""
    read = CALLED | {"index": 0, "function": CALLED["function"] | {"parsed_arguments": {"city": "Rome"}}}
    turns = [ASKED, {"role": "assistant", "content": None, "tool_calls": [read], "parsed": None}, TURNS[2]]
    said = {"role": "assistant", "content": "{}", "parsed": {"city": "Rome"}}
    tokenizer = open_tokenizer(resolve_pretrained("builtin:tiny"))
    assert prompts.encode(tokenizer, chat(messages=turns)) == prompts.encode(tokenizer, chat(messages=TURNS))
    plain = {"role": "assistant", "content": "{}"}
    assert prompts.encode(tokenizer, chat(messages=[ASKED, said])) == prompts.encode(
        tokenizer, chat(messages=[ASKED, plain])
    )


def test_calls_in_an_answer_are_read_and_what_is_no_call_is_text() -> None:
    tools = tools_of(chat())
    assert tools is not None
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    content, calls = tools.read(f"Let me see. {written}{written}")
    assert content == "Let me see."
    assert [call["function"] for call in calls] == [{"name": "weather", "arguments": '{"city": "Rome"}'}] * 2
    assert len({call["id"] for call in calls}) == 2
    for text in (
        "Hello",
        "<tool_call>{",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '{"name": "now"}',
    ):
        assert tools.read(text) == (text, [])
    assert Tools(tools.shown, frozenset(["now"])).read('{"name": "now", "arguments": {}}')[1]


@pytest.mark.parametrize("knows", [False, True])
def test_tools_calls_and_results_reach_the_model(monkeypatch: pytest.MonkeyPatch, knows: bool) -> None:
    tokenizer = open_tokenizer(resolve_pretrained("builtin:tiny"))
    each = (
        "{% for m in messages %}[{{ m.role }}: {{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}]{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", ("{{ tools | tojson if tools }}" if knows else "") + each)
    (ids,) = prompts.encode(tokenizer, chat(messages=TURNS))
    text = tokenizer.decode(ids)
    for word in ("of a city", "weather", "now", "Rain in Rome?", '{"city": "Rome"}', "yes"):
        assert word in text
    assert ("[tool: yes]" in text) == knows
    assert ("<tool_response>yes</tool_response>" in text) != knows
    (hidden,) = prompts.encode(tokenizer, chat(tool_choice="none"))
    assert "of a city" not in tokenizer.decode(hidden)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [NOW, NOW]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"messages": [ASKED | {"tool_calls": [CALLED]}]}, "messages.0.tool_calls"),
    ],
)
def test_odd_tools_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.param == param
