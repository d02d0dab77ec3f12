"""Small helpers for messages: the closest known word, the first line of an error."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest known word, or nothing if none is close.

    Words with dots are paths of settings. Of these, one with the same last part is meant rather than any other.
    """
    words, last = list(known), word.rpartition(".")[2]
    elsewhere = [path for path in words if "." in word and path.rpartition(".")[2] == last]
    close: list[str] = difflib.get_close_matches(word, elsewhere, n=1, cutoff=0)
    close = close or difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
