"""Text that a model has written, on the disk.

    FOLDER/NAME_FINGERPRINT/
        documents.jsonl              every document that is done, in the order in which they were
        N_tokens.jsonl               the text: the first documents by number that have N tokens, ready for data=local
        N_tokens_M_minutes.jsonl     what there was of it when its minutes were over

The fingerprint is that of the model and of how it writes, not of N: a longer text begins with the shorter one.
"""

import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from wrinklefree.core.errors import UserError
from wrinklefree.core.files import file_aside, full_disk_said
from wrinklefree.generate.selftext.documents import Row, Written

log = logging.getLogger("wrinklefree")

DOCUMENTS = "documents.jsonl"

DOCUMENT = TypeAdapter(Written)  # a line of it


def text_file(folder: Path, tokens: int, minutes: float | None = None) -> Path:
    """The file of a text of so many tokens, or of what could be written of it in so many minutes."""
    return folder / (f"{tokens}_tokens.jsonl" if minutes is None else f"{tokens}_tokens_{minutes:g}_minutes.jsonl")


class Documents:
    """The documents that are done, in memory and in a file that grows by a line for each."""

    def __init__(self, folder: Path) -> None:
        """Read the file, and drop a damaged tail. Raises UserError if the file cannot be read or mended."""
        self.file = folder / DOCUMENTS
        self.done: dict[int, Written] = {}
        self.tokens = 0  # of all documents that were not dropped
        if self.file.is_file():
            self._read()

    def _read(self) -> None:
        good = 0
        try:
            with self.file.open("rb") as file:
                for line in file:
                    written = _parsed(line)
                    if written is None:
                        break
                    self._note(written)
                    good += len(line)
            lost = self.file.stat().st_size - good
            if lost:
                log.warning("%s: its last %d bytes are damaged, and are written again", self.file, lost)
                with self.file.open("r+b") as file:
                    file.truncate(good)
        except OSError as error:
            raise UserError(f"{self.file}: {error.strerror}: remove it, and the text is written again") from error

    def add(self, written: Written) -> None:
        """Keep a document. Raises UserError if the disk is full."""
        line = json.dumps(vars(written)) + "\n"
        with full_disk_said(self.file), self.file.open("a", encoding="utf-8") as file:
            file.write(line)
        self._note(written)

    def _note(self, written: Written) -> None:
        self.done[written.number] = written
        self.tokens += 0 if written.row is None else written.tokens

    def missing(self, together: int) -> Iterator[int]:
        """The numbers of the documents that are not done, without end.

        Documents that are written together come together, the done ones too if one of them is missing.
        """
        for start in itertools.count(0, together):
            numbers = range(start, start + together)
            if any(number not in self.done for number in numbers):
                yield from numbers

    def first(self, tokens: int) -> list[Written] | None:
        """The first documents by number that have so many tokens, dropped ones too; None if some are not done yet."""
        if self.tokens < tokens:
            return None
        found: list[Written] = []
        while tokens > 0:
            written = self.done.get(len(found))
            if written is None:
                return None
            found.append(written)
            tokens -= 0 if written.row is None else written.tokens
        return found


def _parsed(line: bytes) -> Written | None:
    """The document of a line, or None if the line is damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        return DOCUMENT.validate_json(line)
    except ValidationError:
        return None


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as a .jsonl file, whole or not at all. Raises UserError if the disk is full."""
    with file_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
