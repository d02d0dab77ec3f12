"""Tools: functions of the client that an answer may call.

| `tool_choice` | the answer |
|---|---|
| `auto` | text, or calls if the model writes `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` |
| `required`, or a function | one call, whose form and arguments a JSON schema constrains |
| `none` | text; the model does not see the tools |

A chat template that knows tools shows them to the model in its own words. For others they are described in a system
message, and calls and results are written into the turns.
"""

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

from wrinklefree.serve.schema import Chat, Completion, Message
from wrinklefree.serve.structured import closed, rewritten

NO_PARAMETERS = {"type": "object", "properties": {}}  # of a function that says nothing of them

CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)

INTRODUCTION = """You may call functions. They are, as JSON:
{tools}
To call one, answer with nothing but: <tool_call>{{"name": NAME, "arguments": OBJECT}}</tool_call>"""


@dataclass(frozen=True)
class Tools:
    """The tools of one request that an answer may call."""

    shown: list[dict[str, Any]]  # as in the request
    forced: frozenset[str]  # the answer has to call one of these; empty: it need not call any

    def schema(self) -> dict[str, Any] | None:
        """The JSON schema of a call that has to be made, or None."""
        functions = [tool["function"] for tool in self.shown if tool["function"]["name"] in self.forced]
        return {"anyOf": [_call_schema(i, function) for i, function in enumerate(functions)]} if functions else None

    def read(self, text: str) -> tuple[str | None, list[dict[str, Any]]]:
        """Split an answer into its text and its calls, as the interface has them. What cannot be read is text."""
        written = [text] if self.forced else CALL.findall(text)
        calls = [call for one in written if (call := self._call(one)) is not None]
        if not written or len(calls) < len(written):
            return text, []
        return ("" if self.forced else text[: text.index("<tool_call>")].strip()) or None, calls

    def _call(self, written: str) -> dict[str, Any] | None:
        try:
            found = json.loads(written)
        except ValueError:
            return None
        names = {tool["function"]["name"] for tool in self.shown}
        if (
            not isinstance(found, dict)
            or found.get("name") not in names
            or not isinstance(found.get("arguments"), dict)
        ):
            return None
        function = {"name": found["name"], "arguments": json.dumps(found["arguments"], ensure_ascii=False)}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _call_schema(index: int, function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a call of one function, which is number `index` of the alternatives."""
    root = f"#/anyOf/{index}/properties/arguments"

    def moved(node: dict[str, Any]) -> dict[str, Any]:
        """What refers to the root of its own schema, `#`, refers to the place that this has now."""
        target = node.get("$ref")
        return node | {"$ref": root + target[1:]} if isinstance(target, str) and target.startswith("#") else node

    arguments = rewritten(closed(function.get("parameters") or NO_PARAMETERS), moved)
    properties = {"name": {"const": function["name"]}, "arguments": arguments}
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def tools_of(request: Chat | Completion) -> Tools | None:
    """The tools of a request; None if there are none, or none may be called."""
    if not isinstance(request, Chat) or not request.tools or request.tool_choice == "none":
        return None
    shown = [tool.model_dump(exclude_none=True) for tool in request.tools]
    names = [tool.function.name for tool in request.tools]
    named = request.named_tool()
    forced = [named] if named is not None else names if request.tool_choice == "required" else []
    return Tools(shown, frozenset(forced))


def conversation(template: str, request: Chat, tools: Tools | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages for a chat template, and what else it is given."""
    shown = [] if tools is None else tools.shown
    if re.search(r"\btools\b", template):
        return [_message(message) for message in request.messages], {"tools": shown} if shown else {}
    messages = [_written(message) for message in request.messages]
    if shown:
        text = INTRODUCTION.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in shown))
        if messages[0]["role"] == "system":
            text = f"{messages.pop(0)['content']}\n\n{text}"
        messages.insert(0, {"role": "system", "content": text})
    return messages, {}


def _message(message: Message) -> dict[str, Any]:
    """A message with its calls as templates that know tools expect them."""
    plain: dict[str, Any] = message.plain()
    if message.tool_calls:
        calls = [{"name": call.function.name, "arguments": call.function.values()} for call in message.tool_calls]
        plain["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return plain


def _written(message: Message) -> dict[str, Any]:
    """A message whose calls or results are part of its text."""
    plain: dict[str, Any] = message.plain()
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>{plain['content']}</tool_response>"}
    for call in message.tool_calls:
        called = json.dumps({"name": call.function.name, "arguments": call.function.values()}, ensure_ascii=False)
        plain["content"] += f"<tool_call>{called}</tool_call>"
    return plain
