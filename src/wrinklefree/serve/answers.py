"""Answers: the text of a request's tokens, and the JSON objects of the OpenAI interface around it."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

from wrinklefree.generate.text import TextStream
from wrinklefree.serve.errors import ending, failed
from wrinklefree.serve.scheduler import ClosedError, FailedError, Stream

Kind = Literal["completion", "chat"]

PREFIX = {"completion": "cmpl", "chat": "chatcmpl"}
WHOLE = {"completion": "text_completion", "chat": "chat.completion"}
CHUNK = {"completion": "text_completion", "chat": "chat.completion.chunk"}


class Answer:
    """The text of one request. `finish` and `tokens` are valid after the last piece."""

    def __init__(self, stream: Stream, text: TextStream) -> None:
        self.stream, self.text = stream, text
        self.tokens = 0  # generated so far
        self.finish = "stop"  # or "length"

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the text piece by piece as it is generated. No piece is empty."""
        async for token in self.stream.tokens():
            self.tokens += 1
            if piece := self.text.add(token):
                yield piece
            if self.text.stopped:
                self.stream.cancel()
                return
        self.finish = self.stream.finish or "stop"
        if piece := self.text.end():
            yield piece
        if self.text.stopped:
            self.finish = "stop"

    def usage(self) -> dict[str, int]:
        """The `usage` object: how many tokens were read and generated."""
        prompt = len(self.stream.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": self.tokens, "total_tokens": prompt + self.tokens}


@dataclass(frozen=True)
class Envelope:
    """The fields that all JSON objects of one answer share."""

    kind: Kind
    model: str
    id: str
    created: int  # seconds since 1970

    @classmethod
    def new(cls, kind: Kind, model: str) -> "Envelope":
        """An envelope with a random id and the current time."""
        return cls(kind, model, f"{PREFIX[kind]}-{secrets.token_hex(12)}", int(time.time()))

    def whole(self, answer: Answer, text: str) -> dict[str, Any]:
        """The object of an answer that is not streamed."""
        content = {"text": text} if self.kind == "completion" else {"message": {"role": "assistant", "content": text}}
        choice = {"index": 0, **content, "finish_reason": answer.finish, "logprobs": None}
        return self._object(WHOLE, choices=[choice], usage=answer.usage())

    async def events(self, answer: Answer, with_usage: bool) -> AsyncIterator[bytes]:
        """Yield a streamed answer as server-sent events.

        They are the pieces of text, the reason why the answer ended, the usage if `with_usage`, and `[DONE]`. If the
        engine fails or the server shuts down before that, the last event is an error.
        """
        more = {"usage": None} if with_usage else {}
        try:
            if self.kind == "chat":
                yield _event(self._object(CHUNK, choices=[_delta({"role": "assistant", "content": ""})], **more))
            async for piece in answer.pieces():
                yield _event(self._object(CHUNK, choices=[self._choice(piece)], **more))
        except ClosedError:
            yield _event(ending().body())
            return
        except FailedError:
            yield _event(failed().body())
            return
        yield _event(self._object(CHUNK, choices=[self._last(answer.finish)], **more))
        if with_usage:
            yield _event(self._object(CHUNK, choices=[], usage=answer.usage()))
        yield b"data: [DONE]\n\n"

    def _choice(self, piece: str) -> dict[str, Any]:
        return _delta({"content": piece}) if self.kind == "chat" else _text(piece)

    def _last(self, finish: str) -> dict[str, Any]:
        return _delta({}, finish) if self.kind == "chat" else _text("", finish)

    def _object(self, names: dict[str, str], **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": names[self.kind], "created": self.created, "model": self.model} | more


def _delta(content: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": content, "finish_reason": finish, "logprobs": None}


def _text(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
