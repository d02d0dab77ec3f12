"""`/v1/responses`, the newer interface of OpenAI's libraries, for text. A request is answered as a chat is.

Nothing is stored, so `previous_response_id` is refused: send the conversation as `input`.
"""

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import count
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, Tag

from wrinklefree.serve import schema
from wrinklefree.serve.answers import Answer, usage
from wrinklefree.serve.errors import ending, failed
from wrinklefree.serve.scheduler import ClosedError, FailedError


class Part(schema._Strict):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] = Field(default_factory=list)  # of an earlier answer; ignored, as the next
    logprobs: list[Any] = Field(default_factory=list)


class Item(schema._Strict):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[Part], Tag("list")], schema._either("a text or a list of parts")
    ]
    id: str | None = None  # of an earlier answer; ignored, as the next
    status: str | None = None

    def message(self) -> dict[str, Any]:
        """The item as a message of a chat."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


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


def _no_tools(tools: list[Any]) -> list[Any]:
    if tools:
        raise ValueError("not supported here: /v1/chat/completions has tools")
    return tools


class Asked(schema.Body):
    """The body of a request."""

    model: str
    input: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[Item], Field(min_length=1), Tag("list")],
        schema._either("a text or a list of messages"),
    ]
    instructions: str | None = None
    max_output_tokens: schema.Count | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stream: bool = False
    text: Text = Text()
    tools: Annotated[list[Any], AfterValidator(_no_tools)] = Field(default_factory=list)
    truncation: Literal["auto", "disabled"] = "disabled"  # prompts are never cut
    reasoning: dict[str, Any] = Field(default_factory=dict)  # ignored
    background: Literal[False] = False

    def chat(self) -> schema.Chat:
        """The chat that this asks for. Raises ApiError 400 for values that a chat has not."""
        turns = [{"role": "system", "content": self.instructions}] if self.instructions else []
        turns += (
            [{"role": "user", "content": self.input}] if isinstance(self.input, str) else map(Item.message, self.input)
        )
        body: dict[str, Any] = {
            "model": self.model,
            "messages": turns,
            "max_tokens": self.max_output_tokens,
            "stream": self.stream,
        }
        body |= {"temperature": self.temperature, "top_p": self.top_p, "response_format": self.text.format.chat()}
        return schema.parse(schema.Chat, json.dumps(body).encode())


@dataclass(frozen=True)
class ResponseEnvelope:
    """The fields that the objects of one response share."""

    asked: Asked
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(12)}")
    message_id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The response of an answer that has ended."""
        cut = answer.finish == "length"
        counts = usage([answer])
        return self._response("incomplete" if cut else "completed", [self._item(answer.said, "completed")]) | {
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
        settings = {"temperature": asked.temperature, "top_p": asked.top_p, "instructions": asked.instructions}
        fixed: dict[str, Any] = {
            "error": None,
            "incomplete_details": None,
            "metadata": {},
            "parallel_tool_calls": False,
            "tools": [],
        }
        about = {"id": self.id, "object": "response", "created_at": self.created, "model": asked.model}
        return about | settings | fixed | {"tool_choice": "auto", "status": status, "output": output, "usage": None}

    def _item(self, text: str | None, status: str) -> dict[str, Any]:
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

    async def _events(self, answer: Answer) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        begun = self._response("in_progress", [])
        place = {"item_id": self.message_id, "output_index": 0, "content_index": 0}
        yield "response.created", {"response": begun}
        yield "response.in_progress", {"response": begun}
        yield "response.output_item.added", {"output_index": 0, "item": self._item(None, "in_progress")}
        yield "response.content_part.added", {**place, "part": _part("")}
        async for piece in answer.pieces():
            yield "response.output_text.delta", {**place, "delta": piece, "logprobs": []}
        yield "response.output_text.done", {**place, "text": answer.said, "logprobs": []}
        yield "response.content_part.done", {**place, "part": _part(answer.said)}
        yield "response.output_item.done", {"output_index": 0, "item": self._item(answer.said, "completed")}
        whole = self.whole(answer)
        yield f"response.{whole['status']}", {"response": whole}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
