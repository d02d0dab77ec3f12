"""Turn a stream of tokens into text. A piece is returned only when no later token or stop string can change it."""

from collections.abc import Sequence
from typing import Any

# Tokens before the new ones that are decoded again with them: in some tokenizers the text of a token, such as its
# leading space, depends on the tokens before it.
CONTEXT = 4


class TextStream:
    """Turns tokens into text.

    `text` is everything so far. `stopped` is true once a stop string came; then `text` ends before it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._start = 0  # tokens from here on are decoded again
        self._read = 0  # tokens before this one are in `text`
        self._given = 0  # characters of `text` that were returned
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take one more token, and return the new text that can no longer change; it may be empty."""
        self._tokens.append(token)
        return "" if self.stopped else self._take(final=False)

    def end(self) -> str:
        """Return the rest of the text. Call this after the last token."""
        return "" if self.stopped else self._take(final=True)

    def _take(self, final: bool) -> str:
        known, now = self._decode(self._start, self._read), self._decode(self._start, len(self._tokens))
        if final or not now.endswith("\ufffd"):  # else the last character lacks bytes, which the next tokens bring
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
        """Cut the text off before the first stop string in it."""
        # The search starts at `_given`: text that may begin a stop string is held back, so none starts before it.
        places = [at for at in (self.text.find(stop, self._given) for stop in self._stops) if at >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True

    def _held(self) -> int:
        """How many characters at the end of the text may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        sizes = range(min(longest, len(self.text)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(self.text[-n:]) for stop in self._stops)), 0)
