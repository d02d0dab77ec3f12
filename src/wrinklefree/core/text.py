"""Helpers for texts: known words, the first line of an error, halves of surrogate pairs, addresses, sizes."""

import difflib
import re
from collections.abc import Iterable

from wrinklefree.core.errors import UserError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` with the known word closest to `word`, or "" if none is close.

    If one of the two is a dotted path of a setting, a known word with the same last part wins over all others.
    """
    words, last = list(known), word.rpartition(".")[2]
    elsewhere = [path for path in words if "." in word + path and path.rpartition(".")[2] == last]
    close: list[str] = difflib.get_close_matches(word, elsewhere, n=1, cutoff=0)
    close = close or difflib.get_close_matches(word, words, n=1)
    # Two letters that changed places are two mistakes for difflib, and too many in a short word: tyni, tiny.
    close = close or [other for other in words if sorted(other) == sorted(word)]
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, or its type if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def has_surrogates(text: str) -> bool:
    """Whether a text has halves of surrogate pairs, or bytes that were decoded with surrogateescape."""
    try:
        text.encode()  # several times faster than a search
    except UnicodeEncodeError:
        return True
    return False


def without_surrogates(text: str) -> str:
    """Join halves of surrogate pairs, and replace a half that is alone (an emoji that was cut in two) by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if has_surrogates(text) else text


def without_bucket(url: str) -> str:
    """An address such as s3://bucket/run as logs and files may have it, s3://.../run. A local path is unchanged."""
    scheme, mark, rest = url.partition("://")
    bucket, slash, path = rest.partition("/")
    return f"{scheme}://...{slash}{path}" if mark and bucket else url


def parse_bytes(option: str, text: str) -> int:
    """Bytes of a text such as 4GB, 500 MB or 1.5g, in decimal units. Raises UserError if it is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not found or not float(found[1]):
        raise UserError(f"{option} {text}: no size; write 500MB or 4GB")
    return int(float(found[1]) * UNITS[found[2]])
