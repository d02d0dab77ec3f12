"""Text from tokens as they come: no piece is given out that a later token, or a stop string, could still change."""

from collections.abc import Sequence
from typing import Any

CONTEXT = 4  # tokens before the new ones that are decoded with them: some tokenizers join words by what stands before


class TextStream:
    """Tokens in, text out: `text` is all of it so far. `stopped` once a stop string came; the text ends before it."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._start, self._read = 0, 0  # decoded are the tokens from `start`; the text of those before `read` is known
        self._given = 0
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain after one more token, beyond what was given before."""
        self._tokens.append(token)
        return "" if self.stopped else self._take(final=False)

    def end(self) -> str:
        """What is left, once no token follows."""
        return "" if self.stopped else self._take(final=True)

    def _take(self, final: bool) -> str:
        known, now = self._decode(self._start, self._read), self._decode(self._start, len(self._tokens))
        if final or not now.endswith("\ufffd"):  # a character may be in the middle of its bytes
            self.text += now[len(known) :]
            self._read = len(self._tokens)
            self._start = max(self._start, self._read - CONTEXT)
        self._stop()
        end = len(self.text) if final or self.stopped else len(self.text) - self._held()
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)
        return text

    def _stop(self) -> None:
        """End the text before the first stop string in it; none lies in what was given out."""
        found = [at for at in (self.text.find(stop, self._given) for stop in self._stops) if at >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        sizes = range(min(longest, len(self.text)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(self.text[-n:]) for stop in self._stops)), 0)
