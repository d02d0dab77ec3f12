"""Answers: text pieces out of a stream of tokens, and the OpenAI interface's objects around them."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

from wrinklefree.generate.text import TextStream
from wrinklefree.serve.errors import ending
from wrinklefree.serve.scheduler import ClosedError, Stream

Kind = Literal["completion", "chat"]

PREFIX = {"completion": "cmpl", "chat": "chatcmpl"}
WHOLE = {"completion": "text_completion", "chat": "chat.completion"}
CHUNK = {"completion": "text_completion", "chat": "chat.completion.chunk"}


class Answer:
    """The text of one stream. `finish` and `tokens` hold once the pieces are through."""

    def __init__(self, stream: Stream, text: TextStream) -> None:
        self.stream, self.text = stream, text
        self.tokens = 0
        self.finish = "stop"

    async def pieces(self) -> AsyncIterator[str]:
        """Text that no later token can change, none of it empty."""
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
        prompt = len(self.stream.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": self.tokens, "total_tokens": prompt + self.tokens}


@dataclass(frozen=True)
class Envelope:
    """What all objects of one answer share."""

    kind: Kind
    model: str
    id: str
    created: int  # seconds since 1970

    @classmethod
    def new(cls, kind: Kind, model: str) -> "Envelope":
        return cls(kind, model, f"{PREFIX[kind]}-{secrets.token_hex(12)}", int(time.time()))

    def whole(self, answer: Answer, text: str) -> dict[str, Any]:
        content = {"text": text} if self.kind == "completion" else {"message": {"role": "assistant", "content": text}}
        choice = {"index": 0, **content, "finish_reason": answer.finish, "logprobs": None}
        return self._object(WHOLE, choices=[choice], usage=answer.usage())

    async def events(self, answer: Answer, with_usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events: pieces, why it ended, usage where wanted, `[DONE]`; or an error as the last of them."""
        more = {"usage": None} if with_usage else {}
        try:
            if self.kind == "chat":
                yield _event(self._object(CHUNK, choices=[_delta({"role": "assistant", "content": ""})], **more))
            async for piece in answer.pieces():
                yield _event(self._object(CHUNK, choices=[self._choice(piece)], **more))
        except ClosedError:
            yield _event(ending().body())
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
