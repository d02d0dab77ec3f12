"""Parse and check the body of a request. A field that is not supported is refused by its name.

The fields are those of the OpenAI interface, plus two that vLLM added: `top_k` and `repetition_penalty`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wrinklefree.engine.sampling import LIMITS
from wrinklefree.serve.errors import ApiError

PENALTY = LIMITS["repetition_penalty"]
LONGEST_STOP = 256  # characters; with each token, the end of the text is compared with every beginning of a stop string

# Fields that are accepted and have no effect on an answer.
IGNORED = {"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"}

# Fields that are not supported, with the values at which they have no effect: only these values are accepted.
NEUTRAL: dict[str, Sequence[Any]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "store": (False,),
}

Text = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Request(_Strict):
    """The fields that completions and chats share. If `max_tokens` is None, the server chooses the length."""

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    repetition_penalty: Annotated[float, Field(ge=PENALTY[0], le=PENALTY[1])] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def usage_wanted(self) -> bool:
        """Whether a streamed answer should end with its token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def length(self) -> tuple[str, int | None]:
        """The name and the value of the field that limits the length of the answer."""
        return "max_tokens", self.max_tokens


class Completion(Request):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)] | Annotated[list[int], Field(min_length=1)]


class Part(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None  # accepted and ignored: chat templates do not use it

    def plain(self) -> dict[str, str]:
        """The message as a chat template expects it: role and one text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Chat(Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None

    def length(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().length()


Kind = TypeVar("Kind", bound=Request)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """Parse a body. Raises ApiError 400 naming the first field that is wrong."""
    values = _without_neutral(_load(body))
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(values, error) from None
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: only with stream=true", "stream_options")
    return request


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
    left_out = IGNORED | NEUTRAL.keys()
    kept = {name: value for name, value in values.items() if name not in left_out and value is not None}
    if isinstance(kept.get("messages"), list):
        kept["messages"] = [_without_empty(message) for message in kept["messages"]]
    return kept


def _without_empty(message: Any) -> Any:
    """The message without fields that hold null or an empty list, except `content`."""
    # Clients send back the message objects of earlier answers, which have such fields.
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if name == "content" or value not in (None, [])}


def _refusal(values: Any, error: ValidationError) -> ApiError:
    """The validation error that helps most, as an ApiError."""
    # For a union, pydantic reports the errors of every member. The one deepest inside the body belongs to the member
    # that was meant.
    errors = error.errors(include_url=False)
    paths = [_path(values, each["loc"], each["type"] == "missing") for each in errors]
    best = max(range(len(errors)), key=lambda i: len(paths[i]))
    field, deepest = ".".join(paths[best]), errors[best]
    if deepest["type"] == "extra_forbidden":
        return ApiError(400, f"{field}: not supported by this server", field, "unsupported_parameter")
    return ApiError(400, f"{field}: {deepest['msg']}", field, "invalid_value")


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
