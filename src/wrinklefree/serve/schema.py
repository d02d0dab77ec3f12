"""Parse and check the body of a request. A field that is not supported is refused by its name.

The fields are those of the OpenAI interface, plus four that vLLM added: `top_k`, `min_p`, `repetition_penalty` and
`chat_template_kwargs`.
"""

import json
import logging
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from wrinklefree.engine.sampling import LIMITS
from wrinklefree.serve.errors import ApiError

log = logging.getLogger("wrinklefree")

MOST_STOPS = 16
MOST_CHOICES = 128  # answers to one request: prompts times the answers to each
MOST_LOGPROBS = 20
MOST_BIASES = 1024
LONGEST_STOP = 256  # characters; with each token, the end of the text is compared with every beginning of a stop string

# Fields that are accepted and have no effect on an answer. The log names each of them once.
IGNORED = {
    *("metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "reasoning_effort"),
    *("safety_identifier", "service_tier", "store", "user", "verbosity"),
}

# Fields that are not supported, with the values at which they have no effect: only these values are accepted.
NEUTRAL: dict[str, Sequence[Any]] = {
    "suffix": ("",),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none",),
}


def _branch(value: Any) -> str | None:
    """Which member of a union of texts and lists the sender meant. Errors are those of this member alone."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else 0
    return "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "list"


def _either(words: str) -> Discriminator:
    return Discriminator(_branch, custom_error_type="union", custom_error_message=f"must be {words}")


def _number(name: str) -> Any:
    """The limits of a setting of `Sampling`."""
    return Field(ge=LIMITS[name][0], le=LIMITS[name][1])


Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[str, Field(pattern=r"^\d{1,9}$")]
Tokens = Annotated[list[int], Field(min_length=1)]
Stop = Annotated[str, Field(max_length=LONGEST_STOP)]
Stops = Annotated[list[Stop], Field(max_length=MOST_STOPS)]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Body(_Strict):
    """The body of a request."""

    def problem(self) -> tuple[str, str] | None:
        """A field that does not go with another, and why."""
        return None


class JsonSchema(_Strict):
    name: str = ""
    description: str | None = None
    strict: bool | None = None  # an answer always follows the schema
    body: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def wanted(self) -> dict[str, Any] | None:
        """The JSON schema that an answer has to follow, or None."""
        if self.json_schema is not None:
            return self.json_schema.body
        return {"type": "object"} if self.type == "json_object" else None


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # ignored: it would make all events of a stream equally long


class Request(Body):
    """The fields that completions and chats share. If `max_tokens` is None, the server chooses the length."""

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, _number("min_p")] = 0.0
    repetition_penalty: Annotated[float, _number("repetition_penalty")] = 1.0
    presence_penalty: Annotated[float, _number("presence_penalty")] = 0.0
    frequency_penalty: Annotated[float, _number("frequency_penalty")] = 0.0
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MOST_BIASES)] = {}
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    response_format: ResponseFormat | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[
        Annotated[Stop, Tag("text")] | Annotated[Stops, Tag("texts")] | Annotated[Stops, Tag("list")],
        _either("a text or a list of texts"),
    ] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    def stops(self) -> list[str]:
        """The stop strings as a list, without empty ones."""
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop) if stop]

    def usage_wanted(self) -> bool:
        """Whether a streamed answer should end with its token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def length(self) -> int | None:
        """The longest answer that is wanted, in tokens."""
        return self.max_tokens

    def scored(self) -> int | None:
        """How many of the likeliest tokens are told for each token; None if no log-probabilities are wanted."""
        raise NotImplementedError

    def candidates(self) -> int:
        """How many answers to each prompt are generated; the best `n` are sent."""
        return self.n

    def problem(self) -> tuple[str, str] | None:
        if self.stream_options is not None and not self.stream:
            return "stream_options", "only with stream=true"
        form = self.response_format
        if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
            return "response_format.json_schema", "belongs to type json_schema, which needs it"
        return None


class Completion(Request):
    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Tag("texts")]
        | Annotated[list[Tokens], Tag("lists")]
        | Annotated[Tokens, Tag("list")],
        _either("a text, a list of token ids, or a list of such prompts"),
    ]
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # 0 only with `echo`
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        return [prompt] if isinstance(prompt[0], int) else prompt

    def scored(self) -> int | None:
        return self.logprobs

    def candidates(self) -> int:
        return self.best_of or self.n

    def problem(self) -> tuple[str, str] | None:
        if self.max_tokens == 0 and not self.echo:
            return "max_tokens", "0 only with echo=true"
        if self.best_of is not None and self.best_of < self.n:
            return "best_of", f"must be at least n={self.n}"
        if self.stream and self.candidates() > self.n:
            return "best_of", "cannot be streamed: the best answer is known at the end"
        if len(self.prompts()) * self.candidates() > MOST_CHOICES:
            return "prompt", f"prompts times answers to each are at most {MOST_CHOICES}"
        return super().problem()


class Part(_Strict):
    type: Literal["text"]
    text: str


Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(_Strict):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None  # a call that has to be made always follows the schema


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(_Strict):
    name: Name


class NamedTool(_Strict):
    type: Literal["function"]
    function: NamedFunction


class CalledFunction(_Strict):
    name: Name
    arguments: str
    parsed_arguments: Any = None  # accepted and ignored: openai's `parse` puts it beside the text

    def values(self) -> Any:
        """The arguments as an object; as they are if they are no JSON."""
        try:
            return json.loads(self.arguments)
        except ValueError:
            return self.arguments


class ToolCall(_Strict):
    id: str
    index: int | None = None  # accepted and ignored: clients send back calls that they put together from a stream
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[str, Tag("text")] | Annotated[list[Part], Tag("list")], _either("a text or a list of parts")
        ]
        | None
    )
    tool_calls: list[ToolCall] = []  # of an assistant
    tool_call_id: str | None = None  # of a tool; accepted and ignored: results stand in the order of calls
    name: str | None = None  # accepted and ignored: chat templates do not use it
    parsed: Any = None  # accepted and ignored: openai's `parse` puts it beside the text

    def plain(self) -> dict[str, str]:
        """The message as a chat template expects it: role and one text."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Chat(Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    chat_template_kwargs: dict[str, Any] = {}
    tools: list[Tool] = []
    tool_choice: Annotated[
        Annotated[Literal["none", "auto", "required"], Tag("text")] | Annotated[NamedTool, Tag("object")],
        Discriminator(lambda value: "text" if isinstance(value, str) else "object"),
    ] = "auto"
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    def scored(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def problem(self) -> tuple[str, str] | None:
        if self.top_logprobs is not None and not self.logprobs:
            return "top_logprobs", "only with logprobs=true"
        return self._message_problem() or self._tool_problem() or super().problem()

    def named_tool(self) -> str | None:
        """The function that has to be called, if the request names one."""
        return None if isinstance(self.tool_choice, str) else self.tool_choice.function.name

    def _message_problem(self) -> tuple[str, str] | None:
        for i, message in enumerate(self.messages):
            if message.content is None and not message.tool_calls:
                return f"messages.{i}.content", "must be a text or a list of parts"
            if message.tool_calls and message.role != "assistant":
                return f"messages.{i}.tool_calls", "only an assistant calls tools"
        return None

    def _tool_problem(self) -> tuple[str, str] | None:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            return "tools", "two have the same name"
        if self.tool_choice == "required" and not names:
            return "tool_choice", "there are no tools"
        named = self.named_tool()
        return None if named is None or named in names else ("tool_choice", f"there is no tool {named!r}")

    def length(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


Kind = TypeVar("Kind", bound=Body)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """Parse a body. Raises ApiError 400 naming the first field that is wrong."""
    values = _without_neutral(_load(body))
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(values, error) from None
    if (wrong := request.problem()) is not None:
        raise ApiError(400, f"{wrong[0]}: {wrong[1]}", wrong[0], "invalid_value")
    return request


def parse_prompt(body: bytes) -> "Completion | Chat":
    """Parse a body that has only a prompt or messages. Raises ApiError 400 naming the first field that is wrong."""
    values = _load(body)
    kind: type[Completion | Chat] = Chat if "messages" in values else Completion
    odd = values.keys() - {"model", "prompt", "messages", "tools", "chat_template_kwargs"}
    if odd:
        name = min(odd)
        raise ApiError(400, f"{name}: not a field of this request", name, "unsupported_parameter")
    return parse(kind, pydantic_core.to_json({"model": ""} | values))


def _load(body: bytes) -> dict[str, Any]:
    try:
        values = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return values


def _without_neutral(values: dict[str, Any]) -> dict[str, Any]:
    """`values` without the fields that have no effect. Raises ApiError 400 for fields that are not supported.

    Clients send null for a field that was not given, so null counts as absent.
    """
    for name in NEUTRAL.keys() & values.keys():
        value = values[name]
        if value is not None and not any(value == v and type(value) is type(v) for v in NEUTRAL[name]):
            raise ApiError(400, f"{name}={_short(value)}: not supported by this server", name, "unsupported_parameter")
    if values.get("logprobs") is False:  # the chat's way to say no, which completions take, too
        del values["logprobs"]
    for name in IGNORED & values.keys():
        _tell_ignored(name)
    left_out = IGNORED | NEUTRAL.keys()
    kept = {name: value for name, value in values.items() if name not in left_out and value is not None}
    if isinstance(kept.get("messages"), list):
        kept["messages"] = [_without_empty(message) for message in kept["messages"]]
    return kept


@cache  # so that a client that sends it each time does not fill the log
def _tell_ignored(name: str) -> None:
    log.info("%s in a request: ignored here and from now on, because it changes no answer", name)


def _without_empty(message: Any) -> Any:
    """The message without fields that hold null or an empty list, except `content`."""
    # Clients send back the message objects of earlier answers, which have such fields.
    if not isinstance(message, dict):
        return message
    kept = {name: value for name, value in message.items() if name == "content" or value not in (None, [])}
    return kept | {"content": None} if "tool_calls" in kept and "content" not in kept else kept


def _refusal(values: Any, error: ValidationError) -> ApiError:
    """The first validation error as an ApiError."""
    first = error.errors(include_url=False)[0]
    field = ".".join(_path(values, first["loc"], first["type"] == "missing"))
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field}: not supported by this server", field, "unsupported_parameter")
    return ApiError(400, f"{field}: {first['msg']}", field, "invalid_value")


def _path(inside: Any, place: Sequence[int | str], is_missing: bool) -> list[str]:
    """The path to a field of the body `inside`, from the `loc` of a pydantic error."""
    path = []
    for part in place:  # of these, the names of a union's members are not in the body and are left out
        if part in inside if isinstance(inside, dict) else isinstance(inside, list) and isinstance(part, int):
            path.append(str(part))
            inside = inside[part]
    return [*path, str(place[-1])] if is_missing else path


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
