"""A small real classification task without a download: which package of the standard library is this code from?

Pieces of a few lines, from packages that every Python from 3.10 on ships and that are of similar size. Files, not
pieces, are dealt to training and test, so no file is in both; each class has equally many pieces in a split. Wherever a
package's name occurs in a piece, in whatever case and inside of longer words, an X stands instead: the answer is never
in the question.
"""

import hashlib
import re
from collections.abc import Iterator
from functools import cache

from wrinklefree.core.errors import UserError
from wrinklefree.data import stdlib
from wrinklefree.data.sources import Example, Split

NAME = "stdlib_kind"
PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")

PIECE = 240  # characters of code at most: about 80 tokens of a small tokenizer
SHORTEST = 80
TEST_SHARE = 0.25

QUESTION = "\nQuestion: Which package is this code from?\nAnswer:"

_NAMES = re.compile(rf"\w*(?:{'|'.join(PACKAGES)})\w*", re.IGNORECASE)


@cache
def examples(split: Split) -> tuple[Example, ...]:
    """The task's examples, classes in turn. Raises UserError where this Python's library lacks a package."""
    library = stdlib.library()
    dealt = {name: _deal(name, library) for name in PACKAGES}
    tested = {piece for pieces in dealt.values() for piece in pieces["heldout"]}
    pieces = {name: set(found[split]) - (tested if split == "train" else set()) for name, found in dealt.items()}
    count = min(len(found) for found in pieces.values())
    if not count:
        absent = [name for name, found in pieces.items() if not found]
        raise UserError(f"data.task=stdlib_kind: this Python's library has no source of {', '.join(absent)}")
    choices = tuple(f" {name}" for name in PACKAGES)
    chosen = {name: sorted(found, key=_digest)[:count] for name, found in pieces.items()}
    return tuple(Example(chosen[name][i] + QUESTION, f" {name}", choices) for i in range(count) for name in PACKAGES)


def _deal(package: str, library: dict[str, str]) -> dict[Split, list[str]]:
    """The pieces of a package, by split: whole files in the order of a hash go to the test while they fit its share."""
    files = {path: list(_pieces(text)) for path, text in library.items() if path.startswith(f"{package}/")}
    wanted = TEST_SHARE * sum(len(pieces) for pieces in files.values())
    dealt: dict[Split, list[str]] = {"train": [], "heldout": []}
    for path in sorted(files, key=_digest):
        fits = len(dealt["heldout"]) + len(files[path]) <= wanted * 1.1
        dealt["heldout" if fits else "train"] += files[path]
    return dealt


def _pieces(text: str) -> Iterator[str]:
    """Runs of whole lines of at most `PIECE` characters, blank lines left out, names of packages masked."""
    piece = ""
    for line in (masked.rstrip() for masked in _NAMES.sub("X", text).splitlines()):
        if not line or len(line) > PIECE:
            continue
        if len(piece) + len(line) >= PIECE:
            yield piece
            piece = ""
        piece += f"\n{line}" if piece else line
    if len(piece) >= SHORTEST:
        yield piece


def _digest(text: str) -> bytes:
    """An order that looks random and is the same everywhere."""
    return hashlib.sha256(text.encode()).digest()
