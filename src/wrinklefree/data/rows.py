"""Reads a file row by row, in the memory of a row: text, JSON, CSV, Parquet and Arrow, plain or gzipped.

What cannot be read is refused by name. Nothing is read as text that is none.

| a file | gives |
|---|---|
| `.txt`, `.md`, `.py`, or another text file that was named outright | parts of `PIECE` characters |
| `.jsonl`, `.ndjson`, `.json` | the objects of its lines, or of its array |
| `.csv`, `.tsv` | its lines, with the columns of the first one |
| `.parquet`, `.arrow` | its rows |

Text may be UTF-8, or UTF-16 or UTF-32 with their mark. All but Parquet and Arrow may end in `.gz`.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, TextIO, cast

from wrinklefree.core.errors import UserError
from wrinklefree.core.text import first_line, has_surrogates
from wrinklefree.data.local_files import DELIMITERS, JSON_SUFFIXES, TABLE_SUFFIXES, UNREAD, ZIPPED, suffix_of

Row = Mapping[str, Any]

MAX_ROW = 32 << 20  # characters or bytes; the longest books have 5 million
# Text files are cut at the first line end after so many characters, so that parts of a book are shuffled and held out.
PIECE = 32768
LONGEST_LINE = 1 << 20  # a longer line of a text file is cut
HEAD = 1 << 16  # bytes that are looked at to tell text from other things

# ValueError: broken JSON, or a number with thousands of digits. RecursionError: thousands of nested lists.
JSON_ERRORS = (ValueError, RecursionError)

_MAGIC = {
    b"\x1f\x8b": "compressed by gzip: end its name in .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: decompress it",
    b"BZh": "compressed by bzip2: decompress it",
    b"\xfd7zXZ": "compressed by xz: decompress it",
    b"PK\x03\x04": "a zip archive (or an office document): take its text out",
    b"%PDF": "a PDF: take its text out, for example with pdftotext",
    b"PAR1": "a Parquet file: end its name in .parquet",
    b"ARROW1": "an Arrow file: end its name in .arrow",
}
_MARKS = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_CONTROL = bytes({*range(32), 127} - set(b"\t\n\r\f\b\x1b"))
_NOT_SPACE = re.compile(r"\S")


class BadRowError(UserError):
    """One row that cannot be read, or that does not hold what it should. The rows after it may be good."""


class EveryRowError(UserError):
    """What is wrong with every row, such as a tokenizer that writes no conversations: skipping rows does not help."""


def read_rows(path: Path, piece: int = PIECE) -> Iterator[Row | str | BadRowError]:
    """Yield the rows of one file, or its text in parts of `piece` characters (-1: whole).

    A row that cannot be read is given as a `BadRowError`, and reading goes on. Raises UserError if it cannot go on: if
    the file is not what its suffix says, or is no text.
    """
    with open_rows(path, piece) as file:
        yield from file.rows


class OpenRows(NamedTuple):
    """A file that is being read."""

    rows: Iterator[Row | str | BadRowError]
    share: Callable[[], float]  # of the file that has been read: above 0, at most 1


@contextmanager
def open_rows(path: Path, piece: int = PIECE) -> Iterator[OpenRows]:
    """Open a file to read its rows, as `read_rows` gives them. Raises UserError if it cannot be read."""
    # The library `datasets` could do this, but it logs lines of its own before it raises, does not say in which line a
    # JSON file is broken, reads huge rows into memory, and takes 0.8 s to import.
    suffix = suffix_of(path)
    if suffix in UNREAD:
        raise UserError(f"{path}: {suffix} is not read: unpack or convert it")
    if suffix in TABLE_SUFFIXES:
        with _table(path, suffix) as table:
            yield table
        return
    with _opened(path, newline="" if suffix in DELIMITERS else None) as (file, share):
        if suffix in JSON_SUFFIXES:
            yield OpenRows(_json_rows(file, path, suffix), share)
        elif suffix in DELIMITERS:
            yield OpenRows(_csv_rows(file, path, DELIMITERS[suffix]), share)
        else:
            yield OpenRows(_pieces(file, path, piece), share)


@contextmanager
def _opened(path: Path, newline: str | None) -> Iterator[tuple[TextIO, Callable[[], float]]]:
    """Open a file as text. Gives it with the share of it that has been read.

    Raises UserError, also for errors of the block, if it is no text or not a whole gzip file.
    Bytes that are not UTF-8 come as surrogates, which `_not_utf8` describes.
    """
    try:
        with path.open("rb") as stored, _unzipped(stored, path) as raw:
            size = max(1, path.stat().st_size)
            encoding = _encoding(path, raw.read(HEAD))
            raw.seek(0)
            errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
            with TextIOWrapper(cast("IO[bytes]", raw), encoding=encoding, errors=errors, newline=newline) as file:
                yield file, lambda: max(1, stored.tell()) / size
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not whole {error.encoding.upper()} ({error.reason}): save it as UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file: {first_line(error)}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or first_line(error)}") from error


def _unzipped(stored: BinaryIO, path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=stored)) if path.name.lower().endswith(ZIPPED) else stored


def _encoding(path: Path, head: bytes) -> str:
    """Return the encoding of a text file that begins with `head`. Raises UserError if it is no text."""
    marked = next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), None)
    if marked is not None:
        return marked
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise UserError(f"{path}: {what}")
    if b"\0" in head:
        raise UserError(f"{path}: not text, since it has zero bytes; if it is UTF-16, save it as UTF-8")
    return "utf-8-sig"


def _not_utf8(path: Path, where: str, text: str) -> str | None:
    """Return what is wrong if `text` came from bytes that are not UTF-8, or None."""
    if not has_surrogates(text):
        return None
    raw = text.encode("utf-8", "surrogateescape")
    if 50 * (len(raw) - len(raw.translate(None, _CONTROL))) > len(raw):
        return f"{where}: not text but bytes of another kind"
    return f"{where}: not UTF-8: convert the file, for example: iconv -f latin1 -t utf-8 {path.name}"


# Text


def _pieces(file: TextIO, path: Path, piece: int) -> Iterator[str]:
    """Yield text, cut at the first line end after each `piece` characters."""
    lines, size = [], 0
    while line := file.readline(LONGEST_LINE):
        lines.append(line)
        size += len(line)
        if 0 <= piece < size:
            yield _checked("".join(lines), path)
            lines, size = [], 0
    if lines:
        yield _checked("".join(lines), path)


def _checked(text: str, path: Path) -> str:
    problem = _not_utf8(path, str(path), text)
    if problem:
        raise UserError(problem)
    return text


# JSON


def _json_rows(file: TextIO, path: Path, suffix: str) -> Iterator[Row | BadRowError]:
    """Yield the objects of a file that has one per line, or that is one array of them."""
    start = file.read(HEAD)
    while start.isspace():
        start = file.read(HEAD)
    file.seek(0)
    if suffix == ".json" and start.lstrip().startswith("["):
        yield from _json_array(file, path)
        return
    more = "; a .json file has one object per line, or is one array of objects" if suffix == ".json" else ""
    number = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        if line.strip():
            yield _json_line(file, line, path, f"{path}, line {number}", more)


def _json_line(file: TextIO, line: str, path: Path, where: str, more: str) -> Row | BadRowError:
    if len(line) > MAX_ROW:
        _finish_line(file)
        return _too_long(where)
    problem = _not_utf8(path, where, line)
    if problem:
        return BadRowError(problem)
    try:
        return _object(json.loads(line), where)
    except json.JSONDecodeError as error:
        return BadRowError(f"{where}: not JSON: {error.msg.removesuffix(' at')} at column {error.colno}{more}")
    except JSON_ERRORS as error:
        return BadRowError(f"{where}: not JSON: {first_line(error)}")


def _finish_line(file: TextIO) -> None:
    """Read on to the end of a line, without keeping it."""
    while (part := file.readline(HEAD)) and not part.endswith("\n"):
        pass


def _too_long(where: str) -> BadRowError:
    return BadRowError(f"{where}: longer than {MAX_ROW >> 20} MB: cut it into several rows")


def _object(value: Any, where: str) -> Row | BadRowError:
    if isinstance(value, dict):
        return value
    return BadRowError(f"{where}: not an object with named columns but {type(value).__name__}")


def _json_array(file: TextIO, path: Path) -> Iterator[Row | BadRowError]:
    """Yield the objects of one array, without ever holding more than one row and what was read with it."""
    text = _Window(file, path)
    text.skip("[")
    number = 0
    while not text.skip("]"):
        number += 1
        if number > 1 and not text.skip(","):
            raise UserError(f"{path}: not JSON: no comma before row {number}")
        yield _object(text.value(number), f"{path}, row {number}")
    if text.more():
        raise UserError(f"{path}: not JSON: more text after the array")


class _Window:
    """The part of a JSON text that was read and not used."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._at = "", 0

    def more(self) -> bool:
        """Move on to the next character that is no space. Return whether there is one."""
        while not (found := _NOT_SPACE.search(self._text, self._at)):
            self._at = len(self._text)
            if not self._read(HEAD):
                return False
        self._at = found.start()
        return True

    def skip(self, character: str) -> bool:
        """Move over `character` if it comes next. Return whether it did. Raises UserError at the end of the file."""
        if not self.more():
            raise UserError(f"{self._path}: not JSON: the array has no end")
        here = self._text[self._at] == character
        self._at += here
        return here

    def value(self, number: int) -> Any:
        """Return the value that comes next. Raises UserError if row `number` is broken or longer than `MAX_ROW`."""
        self.more()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._at)
            except JSON_ERRORS as error:
                self._read_more_of(number, error)
                continue
            if end == len(self._text) and self._read(HEAD):  # a number could go on
                continue
            self._at = min(end, len(self._text))
            return value

    def _read_more_of(self, number: int, error: ValueError | RecursionError) -> None:
        """Read on, since a row may only look broken because its end is missing. Raises UserError if that cannot be."""
        held = len(self._text) - self._at
        if held > MAX_ROW:
            raise UserError(str(_too_long(f"{self._path}, row {number}"))) from error
        if isinstance(error, RecursionError) or not self._read(max(HEAD, held)):  # twice as much each time: linear time
            what = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
            raise UserError(f"{self._path}: not JSON: {what} in row {number}") from error

    def _read(self, size: int) -> bool:
        """Forget what was used, and read on. Return whether there was more."""
        part = self._file.read(size)
        problem = _not_utf8(self._path, str(self._path), part)
        if problem:
            raise UserError(problem)
        self._text, self._at = self._text[self._at :] + part, 0
        return bool(part)


# CSV


class _CountedLines(Iterator[str]):
    """The lines of a file. Raises UserError if those since `size` was set to 0 are longer than a row may be."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path, self.size = file, path, 0

    def __next__(self) -> str:
        line = self._file.readline(MAX_ROW + 1)
        self.size += len(line)
        if self.size > MAX_ROW:
            raise UserError(str(_too_long(f"{self._path}, a row")) + "; or is a closing quote missing?")
        if not line:
            raise StopIteration
        return line


def _csv_rows(file: TextIO, path: Path, delimiter: str) -> Iterator[Row | BadRowError]:
    """Yield the rows under the header. Raises UserError if quotes are broken: nothing after them is certain."""
    csv.field_size_limit(MAX_ROW)  # a document may be longer than the 128 kB of the default
    lines = _CountedLines(file, path)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        columns = next(reader, [])
        if len(set(columns)) != len(columns):
            raise UserError(f"{path}: two columns of one name in the first line: {', '.join(columns)}")
        number = 0
        for fields in reader:
            lines.size = 0
            if fields:
                number += 1
                yield _csv_row(fields, columns, path, f"{path}, row {number}")
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _csv_row(fields: list[str], columns: list[str], path: Path, where: str) -> Row | BadRowError:
    problem = _not_utf8(path, where, "".join(fields))
    if problem:
        return BadRowError(problem)
    if len(fields) != len(columns):
        return BadRowError(f"{where}: {len(fields)} fields, and the first line names {len(columns)} columns")
    return dict(zip(columns, fields, strict=True))


# Tables


@contextmanager
def _table(path: Path, suffix: str) -> Iterator[OpenRows]:
    """Open a Parquet or Arrow file. Raises UserError, also for errors of the block, if it is damaged."""
    import pyarrow as pa  # type: ignore[import-untyped]

    opened, kind = (_parquet, "Parquet") if suffix == ".parquet" else (_arrow, "Arrow")
    done = 0

    def rows(batches: Iterable[Any]) -> Iterator[Row | BadRowError]:
        nonlocal done
        for batch in batches:
            for row in _batch_rows(batch, path, done):
                done += 1
                yield row

    try:
        with opened(path) as (batches, total):
            yield OpenRows(rows(batches), lambda: max(1, done) / max(1, total()))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole {kind} file: {first_line(error)}") from error


@contextmanager
def _parquet(path: Path) -> Iterator[tuple[Iterable[Any], Callable[[], int]]]:
    """Give the record batches of a file, and the number of its rows."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with pq.ParquetFile(path) as file:
        about = file.metadata
        size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        together = max(1, min(1024, MAX_ROW * about.num_rows // max(1, size)))
        yield file.iter_batches(batch_size=together), lambda: about.num_rows


@contextmanager
def _arrow(path: Path) -> Iterator[tuple[Iterable[Any], Callable[[], int]]]:
    """Give the record batches of a stream, as `datasets` writes it, or of an Arrow file, and the number of its rows."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as mapped:
        yield _arrow_batches(mapped), lambda: sum(batch.num_rows for batch in _arrow_batches(mapped))


def _arrow_batches(mapped: Any) -> Iterator[Any]:
    import pyarrow as pa

    mapped.seek(0)
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    read = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)
    batches = (read.get_batch(i) for i in range(read.num_record_batches)) if is_file else read
    for batch in batches:
        batch.validate(full=True)  # pyarrow believes offsets, and follows wrong ones out of the file
        yield batch


def _batch_rows(batch: Any, path: Path, done: int) -> Iterator[Row | BadRowError]:
    """Yield the rows of a record batch, one by one if they are large or if one is broken."""
    # 64 at a time: as Python objects they take a multiple of their bytes.
    for start in range(0, batch.num_rows, 64):
        part = batch.slice(start, 64)
        rows = _plain_rows(part)
        if rows is None:
            singles = range(part.num_rows)
            yield from (_table_row(part.slice(i, 1), f"{path}, row {done + start + i + 1}") for i in singles)
        else:
            yield from rows


def _plain_rows(batch: Any) -> list[Row] | None:
    """Return the rows of a record batch, or None if that would be too much, or if one is broken."""
    if batch.nbytes > MAX_ROW:
        return None
    try:
        rows: list[Row] = batch.to_pylist()
    except UnicodeDecodeError:
        return None
    return rows


def _table_row(batch: Any, where: str) -> Row | BadRowError:
    if batch.nbytes > MAX_ROW:
        return _too_long(where)
    rows = _plain_rows(batch)
    return BadRowError(f"{where}: not UTF-8") if rows is None else rows[0]
