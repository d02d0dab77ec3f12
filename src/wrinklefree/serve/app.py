"""The HTTP routes: check a request, hand it to the scheduler, and send back the answer."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import replace
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
from wrinklefree.serve.models import Models, Served
from wrinklefree.serve.scheduler import BusyError, ClosedError, FailedError, Stream
from wrinklefree.serve.tools import tools_of

log = logging.getLogger("wrinklefree")

SHORT = 16  # tokens of a completion without `max_tokens`; the OpenAI interface's default
PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
BODY_SECONDS = 30.0  # a request whose body takes longer is refused

T = TypeVar("T")


class Service:
    """The routes of a server."""

    def __init__(self, models: Models, access: Access = ANYONE) -> None:
        self.models, self.access = models, access

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            *([Route("/", self.page)] if self.access.page else []),
            Route("/health", self.health),
            Route("/v1/models", self.list_models),
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
        """`GET /health`: what runs the models, how many slots there are, and how many requests. Needs no key."""
        about = {"status": "ok", "engine": self.models.engine(), "slots": self.models.slots()}
        return JSONResponse(about | self.models.load() | {"models": self.models.states()})

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`: counters and gauges in Prometheus' text format."""
        self.access.check_key(request)
        load = self.models.load()
        counters = self.models.totals() | {"engine_failures": load["failures"]}
        gauges = {
            "slots": self.models.slots(),
            "requests_open": load["open"],
            "requests_waiting": load["waiting"],
            "models_open": sum(state["open"] for state in self.models.states()),
        }
        values = [(f"{name}_total", "counter", value) for name, value in counters.items()]
        values += [(name, "gauge", value) for name, value in gauges.items()]
        text = "".join(f"# TYPE wf_{name} {kind}\nwf_{name} {value}\n" for name, kind, value in values)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`: the token ids of a `prompt` or of `messages`, as an answer to them would read them."""
        self.access.check_key(request)
        check_type(request)
        asked = schema.parse_prompt(await _read(request, self.models.limits.body))
        async with self.models.use(self.models.only(asked.model)) as served:
            encode = partial(prompts.encode, served.model.tokenizer, asked, served.model.allow_special)
            ids = await asyncio.get_running_loop().run_in_executor(served.encoder, encode)
        tokens = ids[0] if len(ids) == 1 else ids
        count = sum(map(len, ids))
        return JSONResponse({"tokens": tokens, "count": count, "max_model_len": served.scheduler.engine.context})

    async def embeddings(self, request: Request) -> Response:
        """`POST /v1/embeddings`: refused, because the served models generate text."""
        raise ApiError(501, "embeddings: this server generates text and makes no embeddings", code="not_supported")

    async def list_models(self, request: Request) -> Response:
        """`GET /v1/models`: all models, open or not."""
        self.access.check_key(request)
        return JSONResponse({"object": "list", "data": [offer.about() for offer in self.models.offers.values()]})

    async def one_model(self, request: Request) -> Response:
        """`GET /v1/models/NAME`."""
        self.access.check_key(request)
        return JSONResponse(self.models.about(request.path_params["name"]))

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
        asked = schema.parse(form, await _read(request, self.models.limits.body))
        async with self.models.use(asked.model) as served:
            answers = await _begin(served, asked, "prompt" if kind == "completion" else "messages")
        envelope = Envelope.new(kind, asked.model, served.model.tokenizer, tools_of(asked))
        if await self._finish(request, answers, asked.stream):
            return _Events(answers, envelope.events(answers, asked.usage_wanted()))
        return JSONResponse(envelope.whole(answers, asked.n))

    async def responses(self, request: Request) -> Response:
        """`POST /v1/responses`."""
        self.access.check_key(request)
        check_type(request)
        asked = schema.parse(responses.Asked, await _read(request, self.models.limits.body))
        try:
            chat = asked.chat()
            async with self.models.use(asked.model) as served:
                answers = await _begin(served, chat, "input")
        except ApiError as error:
            raise responses.renamed(error) from None
        envelope = responses.ResponseEnvelope(asked, tools_of(chat))
        if await self._finish(request, answers, asked.stream):
            return _Events(answers, envelope.events(answers[0]))
        return JSONResponse(envelope.whole(answers[0]))

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


async def _begin(served: Served, asked: schema.Completion | schema.Chat, param: str) -> list[Answer]:
    """Check a request, and hand it to the model's scheduler. `param` is the field with its prompt."""
    length = _length(served, asked)
    prepare = partial(_prepare, served, asked)
    ids, constraint = await asyncio.get_running_loop().run_in_executor(served.encoder, prepare)
    for prompt in ids:
        _check_prompt(served, prompt, param)
    return _answers(served, asked, ids, length, constraint)


def _prepare(served: Served, asked: schema.Completion | schema.Chat) -> tuple[list[list[int]], Constraint | None]:
    """The tokens of each prompt, and what the answers are constrained to. Both may take long."""
    ids = prompts.encode(served.model.tokenizer, asked, served.model.allow_special)
    return ids, _constraint(served, asked)


def _constraint(served: Served, asked: schema.Completion | schema.Chat) -> Constraint | None:
    tools = tools_of(asked)
    if tools is not None and (call := tools.schema()) is not None:
        return served.grammars.schema(call, "tools")
    wanted = None if asked.response_format is None else asked.response_format.wanted()
    return None if wanted is None else served.grammars.schema(wanted)


def _answers(
    served: Served,
    asked: schema.Completion | schema.Chat,
    ids: list[list[int]],
    length: int,
    constraint: Constraint | None,
) -> list[Answer]:
    """Submit all prompts as often as the request wants. Answers to one prompt follow one another."""
    count, first = asked.candidates(), _sampling(served, asked, max(length, 1))
    pairs = [
        (prompt, replace(first, seed=first.seed + i, constraint=constraint and constraint.copy()))
        for prompt in ids
        for i in range(count)
    ]
    tokenizer = served.model.tokenizer
    echoes = [text for text in prompts.texts(tokenizer, asked, ids) for _ in range(count)]
    stops, scored = asked.stops(), asked.scored() is not None
    return [
        Answer(stream, TextStream(tokenizer, stops), echo, scored, hidden=length == 0)
        for stream, echo in zip(_submit(served, pairs), echoes, strict=True)
    ]


def _submit(served: Served, pairs: list[tuple[list[int], Sampling]]) -> list[Stream]:
    try:
        return served.scheduler.submit(pairs)
    except BusyError:
        wait = {"Retry-After": "1"}
        raise ApiError(429, "too many requests are waiting: try again later", code="busy", headers=wait) from None
    except ClosedError:
        raise ending() from None


def _check_prompt(served: Served, prompt: list[int], param: str) -> None:
    if not prompt:
        raise ApiError(400, "the prompt is empty: give some text to continue", param, "invalid_value")
    if len(prompt) > served.limits.prompt:
        text = f"the prompt has {len(prompt)} tokens, but this server takes {served.limits.prompt}: shorten it"
        raise ApiError(400, text, param, "context_length_exceeded")


def _length(served: Served, asked: schema.Request) -> int:
    """The longest answer to this request, in tokens: what it asks for, but no more than the server gives."""
    length = asked.length()
    if length is None:
        length = SHORT if isinstance(asked, schema.Completion) else served.limits.answer
    return min(length, served.limits.answer)


def _sampling(served: Served, asked: schema.Completion | schema.Chat, length: int) -> Sampling:
    return Sampling(
        max_new_tokens=length,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        repetition_penalty=asked.repetition_penalty,
        seed=secrets.randbits(64) if asked.seed is None else asked.seed,
        stop_tokens=served.model.ends,
        min_p=asked.min_p,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logit_bias=_bias(served, asked),
        logprobs=asked.scored() if asked.candidates() == asked.n else asked.scored() or 0,
        score_prompt=isinstance(asked, schema.Completion) and asked.echo and asked.logprobs is not None,
    )


def _bias(served: Served, asked: schema.Completion | schema.Chat) -> dict[int, float]:
    """Biases by token id. Raises ApiError 400 for a token that the vocabulary has not."""
    bias, vocab = {int(token): value for token, value in asked.logit_bias.items()}, served.scheduler.engine.vocab
    if odd := [token for token in bias if token >= vocab]:
        text = f"logit_bias: token id {odd[0]}: the vocabulary has {vocab}"
        raise ApiError(400, text, "logit_bias", "invalid_value")
    return bias


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
