"""The HTTP routes: check a request, hand it to the scheduler, and send back the answer."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from wrinklefree.core.errors import UserError
from wrinklefree.engine.sampling import Constraint, Sampling
from wrinklefree.generate.text import TextStream
from wrinklefree.serve import prompts, responses, schema
from wrinklefree.serve.access import ANYONE, Access, check_type
from wrinklefree.serve.answers import Answer, Envelope, Kind
from wrinklefree.serve.errors import ApiError, ending, failed
from wrinklefree.serve.scheduler import BusyError, ClosedError, FailedError, Scheduler, Stream
from wrinklefree.serve.structured import Grammars
from wrinklefree.serve.tools import tools_of

log = logging.getLogger("wrinklefree")

SHORT = 16  # tokens of a completion without `max_tokens`; the OpenAI interface's default
PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
BODY_SECONDS = 30.0  # a request whose body takes longer is refused

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """The longest prompt and answer that are accepted, in tokens."""

    prompt: int
    answer: int

    @property
    def body(self) -> int:
        """The longest body in bytes. A token rarely has more than 64 bytes; the rest is for the other fields."""
        return 2**16 + 64 * self.prompt


@dataclass(frozen=True)
class Model:
    """The model that is served: its name, tokenizer and stop tokens."""

    name: str
    tokenizer: Any
    ends: frozenset[int]  # tokens that end an answer
    engine: str = ""  # what runs the model, in a few words
    allow_special: bool = False  # whether special tokens in a text of a request are read as such
    created: int = field(default_factory=lambda: int(time.time()))

    def about(self) -> dict[str, Any]:
        """The model object of the OpenAI interface."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "wrinklefree"}


class Service:
    """The routes of a server for one model."""

    def __init__(
        self,
        model: Model,
        scheduler: Scheduler,
        limits: Limits,
        access: Access = ANYONE,
    ) -> None:
        self.model, self.scheduler, self.limits, self.access = model, scheduler, limits, access
        self.grammars = Grammars(model.tokenizer, scheduler.engine.vocab, model.ends)
        # Prompts are tokenized in one thread of their own, so that a long one does not hold up the running streams.
        self._encoder = ThreadPoolExecutor(1, "encode")

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            *([Route("/", self.page)] if self.access.page else []),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/metrics", self.metrics),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/responses", self.responses, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {
            ApiError: _refuse,
            HTTPException: _no_route,
            ClientDisconnect: _nobody,
            500: _defect,
        }
        return Starlette(routes=routes, exception_handlers=handlers, middleware=self.access.middleware())

    async def page(self, request: Request) -> Response:
        """`GET /`: a page to chat on. It asks this server alone."""
        return HTMLResponse(PAGE.read_bytes(), headers={"Content-Security-Policy": POLICY})

    async def health(self, request: Request) -> Response:
        """`GET /health`: what runs the model, how many slots there are, and how many requests. Needs no key."""
        about = {"status": "ok", "engine": self.model.engine, "slots": self.scheduler.engine.slots}
        return JSONResponse(about | self.scheduler.load())

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`: counters and gauges in Prometheus' text format."""
        self.access.check_key(request)
        load = self.scheduler.load()
        counters = self.scheduler.totals() | {"engine_failures": load["failures"]}
        gauges = {
            "slots": self.scheduler.engine.slots,
            "requests_open": load["open"],
            "requests_waiting": load["waiting"],
        }
        values = [(f"{name}_total", "counter", value) for name, value in counters.items()]
        values += [(name, "gauge", value) for name, value in gauges.items()]
        text = "".join(f"# TYPE wf_{name} {kind}\nwf_{name} {value}\n" for name, kind, value in values)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`: the token ids of a `prompt` or of `messages`, as an answer to them would read them."""
        self.access.check_key(request)
        check_type(request)
        asked = schema.parse_prompt(await _read(request, self.limits.body))
        encode = partial(prompts.encode, self.model.tokenizer, asked, self.model.allow_special)
        ids = await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
        tokens = ids[0] if len(ids) == 1 else ids
        count = sum(map(len, ids))
        return JSONResponse({"tokens": tokens, "count": count, "max_model_len": self.scheduler.engine.context})

    async def embeddings(self, request: Request) -> Response:
        """`POST /v1/embeddings`: refused, because the served models generate text."""
        raise ApiError(501, "embeddings: this server generates text and makes no embeddings", code="not_supported")

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`: a list of the one model."""
        self.access.check_key(request)
        return JSONResponse({"object": "list", "data": [self.model.about()]})

    async def one_model(self, request: Request) -> Response:
        """`GET /v1/models/NAME`."""
        self.access.check_key(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self.model.about())

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        return await self._answer("completion", schema.Completion, request)

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._answer("chat", schema.Chat, request)

    async def _answer(
        self, kind: Kind, form: type[schema.Completion] | type[schema.Chat], request: Request
    ) -> Response:
        self.access.check_key(request)
        check_type(request)
        asked = schema.parse(form, await _read(request, self.limits.body))
        answers = await self._begin(asked, "prompt" if kind == "completion" else "messages")
        envelope = Envelope.new(kind, self.model.name, self.model.tokenizer, tools_of(asked))
        if await self._finish(request, answers, asked.stream):
            return _Events(answers, envelope.events(answers, asked.usage_wanted()))
        return JSONResponse(envelope.whole(answers, asked.n))

    async def responses(self, request: Request) -> Response:
        """`POST /v1/responses`."""
        self.access.check_key(request)
        check_type(request)
        asked = schema.parse(responses.Asked, await _read(request, self.limits.body))
        answers = await self._begin(asked.chat(), "input")
        envelope = responses.ResponseEnvelope(asked)
        if await self._finish(request, answers, asked.stream):
            return _Events(answers, envelope.events(answers[0]))
        return JSONResponse(envelope.whole(answers[0]))

    async def _begin(self, asked: schema.Completion | schema.Chat, param: str) -> list[Answer]:
        """Check a request, and hand it to the scheduler. `param` is the field with its prompt."""
        self._check_model(asked.model)
        length = self._length(asked)
        ids, constraint = await asyncio.get_running_loop().run_in_executor(self._encoder, partial(self._prepare, asked))
        for prompt in ids:
            self._check_prompt(prompt, param)
        return self._answers(asked, ids, length, constraint)

    async def _finish(self, request: Request, answers: list[Answer], stream: bool) -> bool:
        """Wait until the answers can be sent: until the first has a slot if they are streamed, else until all ended.

        Returns whether they are to be streamed.
        """
        try:
            await _while_connected(request, answers, _opened(answers) if stream else _read_all(answers))
        except UserError as error:
            raise ApiError(400, str(error), "prompt") from None
        except FailedError:
            raise failed() from None
        except ClosedError:
            raise ending() from None
        return stream

    def _prepare(self, asked: schema.Completion | schema.Chat) -> tuple[list[list[int]], Constraint | None]:
        """The tokens of each prompt, and what the answers are constrained to. Both may take long."""
        return prompts.encode(self.model.tokenizer, asked, self.model.allow_special), self._constraint(asked)

    def _constraint(self, asked: schema.Completion | schema.Chat) -> Constraint | None:
        tools = tools_of(asked)
        if tools is not None and (call := tools.schema()) is not None:
            return self.grammars.schema(call, "tools")
        wanted = None if asked.response_format is None else asked.response_format.wanted()
        return None if wanted is None else self.grammars.schema(wanted)

    def _answers(
        self,
        asked: schema.Completion | schema.Chat,
        ids: list[list[int]],
        length: int,
        constraint: Constraint | None,
    ) -> list[Answer]:
        """Submit all prompts as often as the request wants. Answers to one prompt follow one another."""
        count, first = asked.candidates(), self._sampling(asked, max(length, 1))
        pairs = [
            (prompt, replace(first, seed=first.seed + i, constraint=constraint and constraint.copy()))
            for prompt in ids
            for i in range(count)
        ]
        echoes = [text for text in prompts.texts(self.model.tokenizer, asked, ids) for _ in range(count)]
        stops = asked.stops()
        return [
            Answer(
                stream, TextStream(self.model.tokenizer, stops), echo, asked.scored() is not None, hidden=length == 0
            )
            for stream, echo in zip(self._submit(pairs), echoes, strict=True)
        ]

    def _submit(self, pairs: list[tuple[list[int], Sampling]]) -> list[Stream]:
        try:
            return self.scheduler.submit(pairs)
        except BusyError:
            wait = {"Retry-After": "1"}
            raise ApiError(429, "too many requests are waiting: try again later", code="busy", headers=wait) from None
        except ClosedError:
            raise ending() from None

    def _check_model(self, name: str) -> None:
        if name != self.model.name:
            text = f"there is no model {name[:100]!r} here, only {self.model.name!r}"
            raise ApiError(404, text, "model", "model_not_found")

    def _check_prompt(self, prompt: list[int], param: str) -> None:
        if not prompt:
            raise ApiError(400, "the prompt is empty: give some text to continue", param, "invalid_value")
        if len(prompt) > self.limits.prompt:
            text = f"the prompt has {len(prompt)} tokens, but this server takes {self.limits.prompt}: shorten it"
            raise ApiError(400, text, param, "context_length_exceeded")

    def _length(self, asked: schema.Request) -> int:
        """The longest answer to this request, in tokens: what it asks for, but no more than the server gives."""
        length = asked.length()
        if length is None:
            length = SHORT if isinstance(asked, schema.Completion) else self.limits.answer
        return min(length, self.limits.answer)

    def _sampling(self, asked: schema.Completion | schema.Chat, length: int) -> Sampling:
        return Sampling(
            max_new_tokens=length,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            repetition_penalty=asked.repetition_penalty,
            seed=secrets.randbits(64) if asked.seed is None else asked.seed,
            stop_tokens=self.model.ends,
            min_p=asked.min_p,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            logit_bias=self._bias(asked),
            logprobs=asked.scored() if asked.candidates() == asked.n else asked.scored() or 0,
            score_prompt=isinstance(asked, schema.Completion) and asked.echo and asked.logprobs is not None,
        )

    def _bias(self, asked: schema.Completion | schema.Chat) -> dict[int, float]:
        """Biases by token id. Raises ApiError 400 for a token that the vocabulary has not."""
        bias, vocab = {int(token): value for token, value in asked.logit_bias.items()}, self.scheduler.engine.vocab
        if odd := [token for token in bias if token >= vocab]:
            text = f"logit_bias: token id {odd[0]}: the vocabulary has {vocab}"
            raise ApiError(400, text, "logit_bias", "invalid_value")
        return bias

    def close(self) -> None:
        """Stop the thread that tokenizes prompts."""
        self._encoder.shutdown()


class _Events(StreamingResponse):
    """A streamed response. Its slot is freed no matter how the response ends."""

    def __init__(self, answers: list[Answer], events: AsyncIterator[bytes]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self._answers)


def _cancel(answers: Sequence[Answer]) -> None:
    for answer in answers:
        answer.stream.cancel()


async def _opened(answers: Sequence[Answer]) -> None:
    """Wait until the first answer has a slot; the others come when there is room."""
    await answers[0].stream.opened()


async def _read_all(answers: Sequence[Answer]) -> None:
    for answer in answers:
        await answer.stream.opened()
        async for _ in answer.pieces():
            pass


async def _while_connected(request: Request, answers: Sequence[Answer], work: Awaitable[T]) -> T:
    """Await `work` and return its result.

    If the client disconnects first, the work is cancelled and ClientDisconnect is raised. The streams are cancelled
    whenever there is no result, so that their slots are freed.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        if not task.done() or task.cancelled() or task.exception() is not None:
            task.cancel()
            _cancel(answers)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request, most: int) -> bytes:
    """Read the body. Raises ApiError 413 if it is longer than `most` bytes, and 408 if it takes too long."""
    try:
        return await asyncio.wait_for(_collect(request, most), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} s", headers=_CLOSE) from None


_CLOSE = {"Connection": "close"}  # the rest of the body is not read


async def _collect(request: Request, most: int) -> bytes:
    stated = request.headers.get("content-length", "")
    body = bytearray()
    if not stated.isdecimal() or int(stated) <= most:  # a body without a stated length is counted as it comes
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                break
        else:
            return bytes(body)
    raise ApiError(413, f"the body is longer than {most} bytes", code="body_too_large", headers=_CLOSE)


async def _refuse(request: Request, error: ApiError) -> Response:
    return error.response()


async def _no_route(request: Request, error: HTTPException) -> Response:
    text = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, text, headers=error.headers).response()


async def _nobody(request: Request, error: ClientDisconnect) -> Response:
    """The client is gone, so nobody reads this response."""
    return Response(status_code=499)


async def _defect(request: Request, error: Exception) -> Response:
    """Log the traceback of an unexpected error and answer with status 500."""
    log.error("%s %s", request.method, request.url.path, exc_info=error)
    return ApiError(500, "internal error; the server's log has the details").response()
