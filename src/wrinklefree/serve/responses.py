"""`/v1/responses`, the newer interface of OpenAI's libraries: text and calls of functions. A request is answered as a
chat is.

Nothing is stored, so `previous_response_id` is refused: send the conversation as `input`.
"""

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from wrinklefree.serve import schema
from wrinklefree.serve.answers import Answer, usage
from wrinklefree.serve.errors import ApiError, ending, failed
from wrinklefree.serve.scheduler import ClosedError, FailedError
from wrinklefree.serve.tools import Tools

Event = tuple[str, dict[str, Any]]  # name and body
CHAT_NAMES = {"response_format": "text.format", "messages": "input"}  # fields of a chat, and what they are here


class Part(schema._Strict):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] = Field(default_factory=list)  # of an earlier answer; ignored, as the next
    logprobs: list[Any] = Field(default_factory=list)


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Part], Tag("list")], schema._either("a text or a list of parts")
]


class Item(schema._Strict):
    """An item of the input. `id` and `status` are those of an earlier answer, and ignored."""

    id: str | None = None
    status: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        """Clients send back items of earlier answers, with fields that hold null."""
        return {name: v for name, v in value.items() if v is not None} if isinstance(value, dict) else value

    def message(self) -> dict[str, Any]:
        """The item as a message of a chat."""
        raise NotImplementedError


class Said(Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def message(self) -> dict[str, Any]:
        return {"role": self.role, "content": _text_of(self.content)}


class Called(Item):
    type: Literal["function_call"]
    call_id: str
    name: schema.Name
    arguments: str

    def message(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"role": "assistant", "content": None, "tool_calls": [{"id": self.call_id, "function": function}]}


class Returned(Item):
    type: Literal["function_call_output"]
    call_id: str
    output: Content

    def message(self) -> dict[str, Any]:
        return {"role": "tool", "content": _text_of(self.output), "tool_call_id": self.call_id}


def _text_of(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


AnyItem = Annotated[
    Annotated[Said, Tag("message")]
    | Annotated[Called, Tag("function_call")]
    | Annotated[Returned, Tag("function_call_output")],
    Discriminator(
        lambda value: value.get("type", "message") if isinstance(value, dict) else None,
        custom_error_type="union",
        custom_error_message="must be a message, a function_call or a function_call_output",
    ),
]


def _turns(items: Sequence[Item]) -> list[dict[str, Any]]:
    """The messages of a chat. What an assistant says, and the calls that follow, are one message."""
    turns: list[dict[str, Any]] = []
    for item in items:
        turn = item.message()
        if "tool_calls" in turn and turns and turns[-1]["role"] == "assistant":
            turns[-1]["tool_calls"] = turns[-1].get("tool_calls", []) + turn["tool_calls"]
        else:
            turns.append(turn)
    return turns


class Format(schema._Strict):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    description: str | None = None
    strict: bool | None = None
    body: dict[str, Any] | None = Field(alias="schema", default=None)

    def chat(self) -> dict[str, Any]:
        """The `response_format` of a chat."""
        return {"type": self.type} | ({} if self.body is None else {"json_schema": {"schema": self.body}})


class Text(schema._Strict):
    format: Format = Format()
    verbosity: str | None = None  # ignored


class Tool(schema._Strict):
    type: Literal["function"]
    name: schema.Name
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None  # a call that has to be made always follows the schema

    def chat(self) -> dict[str, Any]:
        """The tool of a chat."""
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class NamedTool(schema._Strict):
    type: Literal["function"]
    name: schema.Name


class Asked(schema.Body):
    """The body of a request."""

    model: str
    input: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[AnyItem], Field(min_length=1), Tag("list")],
        schema._either("a text or a list of items"),
    ]
    instructions: str | None = None
    max_output_tokens: schema.Count | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stream: bool = False
    text: Text = Text()
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Annotated[
        Annotated[Literal["none", "auto", "required"], Tag("text")] | Annotated[NamedTool, Tag("object")],
        Discriminator(lambda value: "text" if isinstance(value, str) else "object"),
    ] = "auto"
    truncation: Literal["auto", "disabled"] = "disabled"  # prompts are never cut
    reasoning: dict[str, Any] = Field(default_factory=dict)  # ignored
    include: list[Literal["reasoning.encrypted_content"]] = Field(default_factory=list)  # there is no such content
    stream_options: schema.StreamOptions | None = None
    background: Literal[False] = False

    def problem(self) -> tuple[str, str] | None:
        if (self.text.format.type == "json_schema") != (self.text.format.body is not None):
            return "text.format.schema", "belongs to type json_schema, which needs it"
        if isinstance(self.input, str):
            return None
        calls = {item.call_id for item in self.input if isinstance(item, Called)}
        for i, item in enumerate(self.input):
            if isinstance(item, Returned) and item.call_id not in calls:
                return f"input.{i}.call_id", f"there is no function_call {item.call_id!r} in the input"
        return None

    def chat(self) -> schema.Chat:
        """The chat that this asks for. Raises ApiError 400 for values that a chat has not."""
        turns = [{"role": "system", "content": self.instructions}] if self.instructions else []
        turns += [{"role": "user", "content": self.input}] if isinstance(self.input, str) else _turns(self.input)
        body: dict[str, Any] = {
            "model": self.model,
            "messages": turns,
            "max_tokens": self.max_output_tokens,
            "stream": self.stream,
            "tools": [tool.chat() for tool in self.tools],
            "tool_choice": self._choice(),
        }
        body |= {"temperature": self.temperature, "top_p": self.top_p, "response_format": self.text.format.chat()}
        return schema.parse(schema.Chat, json.dumps(body).encode())

    def _choice(self) -> str | dict[str, Any]:
        choice = self.tool_choice
        return choice if isinstance(choice, str) else {"type": "function", "function": {"name": choice.name}}


def renamed(error: ApiError) -> ApiError:
    """The error of a chat with the names that its fields have here."""
    here = CHAT_NAMES.get(error.param or "")
    if here is None:
        return error
    text = error.message.replace(f"{error.param}:", f"{here}:", 1)
    return ApiError(error.status, text, here, error.code, error.headers)


@dataclass(frozen=True)
class ResponseEnvelope:
    """The fields that the objects of one response share."""

    asked: Asked
    tools: Tools | None  # which the answer may call
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(12)}")
    message_id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The response of an answer that has ended."""
        return self._ended(answer, self._items(answer))

    def _items(self, answer: Answer) -> list[dict[str, Any]]:
        """What an answer that has ended consists of: a text, calls, or both."""
        text, calls = (answer.said, []) if self.tools is None else self.tools.read(answer.said)
        said = [] if calls and text is None else [self._message(text, _ended_as(answer))]
        return said + [_call(call["id"], **call["function"]) for call in calls]

    def _ended(self, answer: Answer, output: list[dict[str, Any]]) -> dict[str, Any]:
        counts = usage([answer])
        cut = answer.finish == "length"
        return self._response(_ended_as(answer), output) | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            },
        }

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        asked = self.asked
        settings = asked.model_dump(
            by_alias=True,
            include={"model", "temperature", "top_p", "instructions", "max_output_tokens", "tools", "tool_choice"}
            | {"text", "truncation"},
        )
        fixed: dict[str, Any] = {
            "error": None,
            "incomplete_details": None,
            "metadata": {},
            "parallel_tool_calls": False,
            "usage": None,
        }
        about = {"id": self.id, "object": "response", "created_at": self.created}
        return about | settings | fixed | {"status": status, "output": output}

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"type": "message", "id": self.message_id, "status": status, "role": "assistant", "content": content}

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        """Yield a streamed response as server-sent events, each with its name and number."""
        numbers = count()
        try:
            async for name, more in self._events(answer):
                body = {"type": name, "sequence_number": next(numbers), **more}
                yield f"event: {name}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n".encode()
        except (ClosedError, FailedError) as error:
            told = (ending() if isinstance(error, ClosedError) else failed()).body()["error"]
            body = {"type": "error", "sequence_number": next(numbers), **told}
            yield f"event: error\ndata: {json.dumps(body)}\n\n".encode()

    async def _events(self, answer: Answer) -> AsyncIterator[Event]:
        begun = self._response("in_progress", [])
        yield "response.created", {"response": begun}
        yield "response.in_progress", {"response": begun}
        if self.tools is None:
            async for event in self._text_events(0, answer, answer.pieces()):
                yield event
            output = self._items(answer)
        else:
            async for _ in answer.pieces():  # whether it is a call is known at its end
                pass
            output = self._items(answer)
            for index, item in enumerate(output):
                async for event in self._item_events(index, answer, item):
                    yield event
        whole = self._ended(answer, output)
        yield f"response.{whole['status']}", {"response": whole}

    async def _text_events(self, index: int, answer: Answer, pieces: AsyncIterator[str]) -> AsyncIterator[Event]:
        place = {"item_id": self.message_id, "output_index": index, "content_index": 0}
        yield "response.output_item.added", {"output_index": index, "item": self._message(None, "in_progress")}
        yield "response.content_part.added", {**place, "part": _part("")}
        text = ""
        async for piece in pieces:
            text += piece
            yield "response.output_text.delta", {**place, "delta": piece, "logprobs": []}
        yield "response.output_text.done", {**place, "text": text, "logprobs": []}
        yield "response.content_part.done", {**place, "part": _part(text)}
        yield "response.output_item.done", {"output_index": index, "item": self._message(text, _ended_as(answer))}

    async def _item_events(self, index: int, answer: Answer, item: dict[str, Any]) -> AsyncIterator[Event]:
        """The events of an item that is known already: its text or its arguments come as one piece."""
        if item["type"] == "message":
            async for event in self._text_events(index, answer, _once(item["content"][0]["text"])):
                yield event
            return
        place, arguments = {"item_id": item["id"], "output_index": index}, item["arguments"]
        begun = item | {"arguments": "", "status": "in_progress"}
        yield "response.output_item.added", {"output_index": index, "item": begun}
        yield "response.function_call_arguments.delta", {**place, "delta": arguments}
        yield "response.function_call_arguments.done", {**place, "name": item["name"], "arguments": arguments}
        yield "response.output_item.done", {"output_index": index, "item": item}


async def _once(text: str) -> AsyncIterator[str]:
    yield text


def _ended_as(answer: Answer) -> str:
    return "incomplete" if answer.finish == "length" else "completed"


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    item_id = f"fc_{call_id.removeprefix('call_')}"
    about = {"type": "function_call", "id": item_id, "call_id": call_id, "status": "completed"}
    return about | {"name": name, "arguments": arguments}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
