"""A small real classification task without a download: which package of the standard library is this code from?

Each example is a piece of a few lines from one of six packages. Every Python from 3.10 on ships them, and they are of
similar size. The split is by file, so no file is in both splits. Each class has equally many pieces in a split.
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

# Words that contain a package's name are replaced by X, so that the question does not hold the answer.
_NAMES = re.compile(rf"\w*(?:{'|'.join(PACKAGES)})\w*", re.IGNORECASE)


@cache
def examples(split: Split) -> tuple[Example, ...]:
    """Return the task's examples, one class after the other in turn.

    Raises UserError if this Python's library lacks a package.
    """
    library = stdlib.library()
    splits = {name: _split(name, library) for name in PACKAGES}
    tested = {piece for by_split in splits.values() for piece in by_split["heldout"]}
    pieces = {name: set(both[split]) - (tested if split == "train" else set()) for name, both in splits.items()}
    count = min(map(len, pieces.values()))
    if not count:
        absent = [name for name, own in pieces.items() if not own]
        raise UserError(f"data.task=stdlib_kind: this Python's library has no source of {', '.join(absent)}")
    choices = tuple(f" {name}" for name in PACKAGES)
    chosen = {name: sorted(own, key=_digest)[:count] for name, own in pieces.items()}
    return tuple(Example(chosen[name][i] + QUESTION, f" {name}", choices) for i in range(count) for name in PACKAGES)


def _split(package: str, library: dict[str, str]) -> dict[Split, list[str]]:
    """Return a package's pieces by split. Whole files, in the order of a hash, are held out as long as they fit."""
    files = {path: list(_pieces(text)) for path, text in library.items() if path.startswith(f"{package}/")}
    wanted = TEST_SHARE * sum(len(pieces) for pieces in files.values())
    splits: dict[Split, list[str]] = {"train": [], "heldout": []}
    for path in sorted(files, key=_digest):
        fits = len(splits["heldout"]) + len(files[path]) <= wanted * 1.1
        splits["heldout" if fits else "train"] += files[path]
    return splits


def _pieces(text: str) -> Iterator[str]:
    """Yield runs of whole lines, at most `PIECE` characters each, without blank lines and with names masked."""
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
    """Sort key for an order that looks random and is the same on every machine."""
    return hashlib.sha256(text.encode()).digest()
