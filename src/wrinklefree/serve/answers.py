"""Answers: the text of a request's tokens, and the JSON objects of the OpenAI interface around it."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from wrinklefree.generate.text import TextStream
from wrinklefree.serve.errors import ending, failed
from wrinklefree.serve.logprobs import Scored, for_chat, for_completion
from wrinklefree.serve.scheduler import ClosedError, Event, FailedError, Stream
from wrinklefree.serve.tools import Tools

Kind = Literal["completion", "chat"]

PREFIX = {"completion": "cmpl", "chat": "chatcmpl"}
WHOLE = {"completion": "text_completion", "chat": "chat.completion"}
CHUNK = {"completion": "text_completion", "chat": "chat.completion.chunk"}


class Answer:
    """The text of one answer. `finish`, `said`, `tokens` and `logprob` are valid after the last piece.

    `echo` is the prompt's text if the answer begins with it. `scored` says whether scores are shown. `hidden` is for a
    request of no tokens: the one that the engine then generates is not shown.
    """

    def __init__(self, stream: Stream, text: TextStream, echo: str, scored: bool, hidden: bool) -> None:
        self.stream, self.text, self.echo, self.scored, self.hidden = stream, text, echo, scored, hidden
        self.tokens = 0  # generated so far
        self.logprob = 0.0  # of all these tokens together
        self.finish = "stop"  # or "length"
        self.said = ""
        self._scored: list[Scored] = []  # tokens whose scores nobody has taken

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the text piece by piece as it is generated. No piece is empty."""
        first = self.echo
        async for event in self.stream.tokens():
            piece, first = first + self._take(event), ""
            if piece:
                self.said += piece
                yield piece
            if self.text.stopped:
                self.stream.cancel()
                return
        self.finish = "length" if self.hidden else self.stream.finish or "stop"
        if piece := self.text.end():
            self.said += piece
            yield piece
        if self.text.stopped:
            self.finish = "stop"

    def _take(self, event: Event) -> str:
        """Take one token with its scores. Returns the text that is now certain."""
        place = len(self.echo) + len(self.text.text)
        scores = iter(event.scores)
        if self.stream.sampling.score_prompt and not self._scored and self.tokens == 0:
            prompt = self.stream.prompt
            self._scored = [Scored(prompt[0], None, 0)]
            self._scored += [Scored(token, score, 0) for token, score in zip(prompt[1:], scores, strict=False)]
        if self.hidden:
            return ""
        self.tokens += 1
        for score in scores:
            self.logprob += score.logprob
            self._scored.append(Scored(event.token, score, place))
        return self.text.add(event.token)

    def take_scores(self) -> list[Scored]:
        """The tokens since the last call with their scores, if scores are shown."""
        taken, self._scored = self._scored, []
        return taken if self.scored else []


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """The `usage` object: how many tokens were read and generated. Answers to one prompt share its tokens."""
    prompts = {id(answer.stream.prompt): len(answer.stream.prompt) for answer in answers}
    prompt, tokens = sum(prompts.values()), sum(answer.tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def best(answers: Sequence[Answer], count: int) -> list[Answer]:
    """The `count` answers with the highest log-probability per token, the best first."""
    return sorted(answers, key=lambda answer: answer.logprob / max(answer.tokens, 1), reverse=True)[:count]


@dataclass(frozen=True)
class Envelope:
    """The fields that all JSON objects of one request share."""

    kind: Kind
    model: str
    tokenizer: Any
    id: str
    created: int  # seconds since 1970
    tools: Tools | None  # which the answers may call

    @classmethod
    def new(cls, kind: Kind, model: str, tokenizer: Any, tools: Tools | None) -> "Envelope":
        """An envelope with a random id and the current time."""
        return cls(kind, model, tokenizer, f"{PREFIX[kind]}-{secrets.token_hex(12)}", int(time.time()), tools)

    def whole(self, answers: Sequence[Answer], n: int) -> dict[str, Any]:
        """The object of answers that are not streamed: `n` choices for each prompt, which are the best."""
        groups: dict[int, list[Answer]] = {}
        for answer in answers:
            groups.setdefault(id(answer.stream.prompt), []).append(answer)
        chosen = [answer for group in groups.values() for answer in (best(group, n) if len(group) > n else group)]
        choices = [self._choice(index, answer) for index, answer in enumerate(chosen)]
        return self._object(WHOLE, choices=choices, usage=usage(answers))

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        said, finish = self._message(answer)
        content = {"text": answer.said} if self.kind == "completion" else {"message": {"role": "assistant", **said}}
        return {"index": index, **content, "finish_reason": finish, "logprobs": self._logprobs(answer)}

    def _message(self, answer: Answer) -> tuple[dict[str, Any], str]:
        """The text and the calls of an answer that has ended, and why it ended."""
        if self.tools is not None:
            content, calls = self.tools.read(answer.said)
            if calls:
                return {"content": content, "tool_calls": calls}, "tool_calls"
        return {"content": answer.said}, answer.finish

    def _logprobs(self, answer: Answer) -> dict[str, Any] | None:
        if not (scored := answer.take_scores()):
            return None
        return (for_completion if self.kind == "completion" else for_chat)(self.tokenizer, scored)

    async def events(self, answers: Sequence[Answer], with_usage: bool) -> AsyncIterator[bytes]:
        """Yield streamed answers as server-sent events.

        They are the pieces of text, the reason why each answer ended, the usage if `with_usage`, and `[DONE]`. If the
        engine fails or the server shuts down before that, the last event is an error.
        """
        more = {"usage": None} if with_usage else {}
        try:
            async for choice in _merged([self._deltas(index, answer) for index, answer in enumerate(answers)]):
                yield _event(self._object(CHUNK, choices=[choice], **more))
        except ClosedError:
            yield _event(ending().body())
            return
        except FailedError:
            yield _event(failed().body())
            return
        if with_usage:
            yield _event(self._object(CHUNK, choices=[], usage=usage(answers)))
        yield b"data: [DONE]\n\n"

    async def _deltas(self, index: int, answer: Answer) -> AsyncIterator[dict[str, Any]]:
        """The choices of one answer's chunks."""
        if index:  # the first has a slot, or there would be no stream
            await answer.stream.opened()
        if self.kind == "chat":
            yield _delta(index, {"role": "assistant", "content": ""})
        if self.tools is not None:
            async for delta in self._deltas_with_tools(index, answer):
                yield delta
            return
        async for piece in answer.pieces():
            content = _delta(index, {"content": piece}) if self.kind == "chat" else _text(index, piece)
            yield content | {"logprobs": self._logprobs(answer)}
        last = _delta(index, {}) if self.kind == "chat" else _text(index, "")
        yield last | {"finish_reason": answer.finish, "logprobs": self._logprobs(answer)}

    async def _deltas_with_tools(self, index: int, answer: Answer) -> AsyncIterator[dict[str, Any]]:
        """The whole answer in one chunk: whether it is a call is known at its end."""
        async for _ in answer.pieces():
            pass
        said, finish = self._message(answer)
        calls = [{"index": i, **call} for i, call in enumerate(said.get("tool_calls", []))]
        yield _delta(index, said | ({"tool_calls": calls} if calls else {})) | {"logprobs": self._logprobs(answer)}
        yield _delta(index, {}) | {"finish_reason": finish}

    def _object(self, names: dict[str, str], **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": names[self.kind], "created": self.created, "model": self.model} | more


async def _merged(streams: Sequence[AsyncIterator[dict[str, Any]]]) -> AsyncIterator[dict[str, Any]]:
    """Yield from all streams, whichever has something."""
    if len(streams) == 1:  # a task for each token would cost more than the token's event
        async for item in streams[0]:
            yield item
        return
    waiting = {asyncio.ensure_future(_next(stream)): stream for stream in streams}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                stream = waiting.pop(task)
                if (found := task.result()) is not None:
                    yield found
                    waiting[asyncio.ensure_future(_next(stream))] = stream
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _next(stream: AsyncIterator[dict[str, Any]]) -> dict[str, Any] | None:
    return await anext(stream, None)


def _delta(index: int, content: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": content, "finish_reason": None, "logprobs": None}


def _text(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "finish_reason": None, "logprobs": None}


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
