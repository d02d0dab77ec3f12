"""Where documents come from: Python's own library, local files, the Hugging Face hub.

A source gives its documents in one fixed order and can go on from any position; shuffling is `packing.BatchStream`'s.
What is held out: stdlib's own split; a local file or hub split that the config names; else every 20th local document,
or the first documents of a hub dataset, of either at most 512.

Local files are read here rather than by `datasets`, which logs lines of its own before it raises, does not say in which
line a JSON file is broken, and takes 0.8 s to import.
"""

import json
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from wrinklefree.core.errors import UserError


class Example(NamedTuple):
    """A question and its answer: only the answer is learned. Prompt and answer are one text, laid end to end."""

    prompt: str
    answer: str  # with the space before it
    choices: tuple[str, ...] = ()  # the possible answers, where there are only so many


Split = Literal["train", "heldout"]

Document = str | Example
Position = dict[str, Any]
Row = Mapping[str, Any]
Render = Callable[[Row, str], Document]  # a row and where it is from, for the error message -> its text

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".parquet")

HOLDOUT_EVERY = 20
# About 0.5 M tokens of ordinary documents: plenty for a figure, seconds to tokenize, though the dataset be terabytes.
HELDOUT_DOCUMENTS = 512
# What Python raises of broken JSON, of numbers of thousands of digits, and of thousands of lists in one another.
JSON_ERRORS = (ValueError, RecursionError)
# Characters after which a text file is cut, at a line end: a book in one file is then shuffled and held out in parts.
PIECE = 32768


def is_blank(document: Document) -> bool:
    """Whether there is nothing to learn in it."""
    return not (document if isinstance(document, str) else document.answer).strip()


class Source(Protocol):
    """Documents in a fixed order."""

    name: str  # the setting that names it, for messages and to recognize it at a resume
    hint: str  # what to do where it turns out empty: appended to a message

    def documents(self, start: Position | None) -> Iterator[Document]:
        """The documents from `start` (None: the first) to the last, once."""

    def position(self) -> Position:
        """Where the latest `documents` call has got to, in plain values: just after the document it gave last."""


class Memory:
    """Documents that fit in memory."""

    hint = ""

    def __init__(self, name: str, texts: Iterable[Document]):
        self.name = name
        self._texts = list(texts)
        self._next = 0

    def documents(self, start: Position | None) -> Iterator[Document]:
        self._next = start["document"] if start else 0
        while self._next < len(self._texts):
            self._next += 1
            yield self._texts[self._next - 1]

    def position(self) -> Position:
        return {"document": self._next}


class Files:
    """Documents of local files, one file after the other; those whose running number `keep` accepts."""

    def __init__(
        self, name: str, paths: list[Path], render: Render, keep: Callable[[int], bool] = lambda _: True, hint: str = ""
    ):
        self.name, self.hint = name, hint
        self._paths, self._render, self._keep = paths, render, keep
        self._position = {"file": 0, "row": 0, "document": 0}

    def documents(self, start: Position | None) -> Iterator[Document]:
        at = self._position = dict(start or {"file": 0, "row": 0, "document": 0})
        while at["file"] < len(self._paths):
            for text in islice(read(self._paths[at["file"]], self._render), at["row"], None):
                at["row"] += 1
                if is_blank(text):
                    continue
                at["document"] += 1
                if self._keep(at["document"] - 1):
                    yield text
            at["file"], at["row"] = at["file"] + 1, 0

    def position(self) -> Position:
        return dict(self._position)


class Hub:
    """Rows of a streaming `datasets.IterableDataset`, without the first `skip` documents."""

    def __init__(self, name: str, dataset: Any, render: Render, skip: int = 0, hint: str = ""):
        self.name, self.hint = name, hint
        self._dataset, self._render, self._skip = dataset, render, skip
        self._seen = 0
        self._beginning = dataset.state_dict()

    def documents(self, start: Position | None) -> Iterator[Document]:
        # Always a state, also for the start: without one, datasets goes on from the last state it was given.
        self._dataset.load_state_dict(start["rows"] if start else self._beginning)
        self._seen = start["document"] if start else 0
        for row in self._dataset:
            text = self._render(row, self.name)
            if is_blank(text):
                continue
            self._seen += 1
            if self._seen > self._skip:
                yield text

    def position(self) -> Position:
        return {"document": self._seen, "rows": self._dataset.state_dict()}


class Interleaved:
    """Sources of as many documents each, one of each in turn, but none that is equal to one before it of its turn."""

    def __init__(self, sources: list[Source]):
        self.name, self.hint = sources[0].name, sources[0].hint
        self._sources = sources
        self._turn: list[Position | None] = [None] * len(sources)  # where each was before this turn
        self._given = 0  # of this turn

    def documents(self, start: Position | None) -> Iterator[Document]:
        self._turn = start["turn"] if start else [None] * len(self._sources)
        self._given = start["given"] if start else 0
        streams = [source.documents(at) for source, at in zip(self._sources, self._turn, strict=True)]
        for turn in zip(*streams, strict=True):
            while self._given < len(turn):
                document, before = turn[self._given], turn[: self._given]
                self._given += 1
                if document not in before:
                    yield document
            self._turn, self._given = [source.position() for source in self._sources], 0

    def position(self) -> Position:
        return {"turn": self._turn, "given": self._given}


def row_text(row: Row, where: str, column: str, chat: Callable[[Row, str], str]) -> str:
    """The text of a row: its `column`, or else its `messages` written out by `chat`.

    Raises UserError naming the columns there are where it has neither, and where the text is no text.
    """
    if column not in row:
        if "messages" in row:
            return chat(row, where)
        raise UserError(f"{where}: no column {column!r}; set data.text_column to one of: {', '.join(map(str, row))}")
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: column {column!r} holds {type(text).__name__}, not text: set data.text_column")
    return text


def find_files(setting: str, path: str | None) -> list[Path]:
    """The file `path`, or all files of the folder with a suffix that is read, by POSIX path, hidden ones left out.

    Raises UserError where there is none; `setting` is the key that named it.
    """
    if path is None:
        raise UserError(f"{setting}: a value is required: a file or folder of {', '.join(SUFFIXES)}")
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"{setting}={path}: no such file or folder")
    relative = sorted(found.relative_to(root).as_posix() for found in root.rglob("*") if found.suffix in SUFFIXES)
    files = [root / name for name in relative if not _is_hidden(name) and (root / name).is_file()]
    if not files:
        raise UserError(f"{setting}={path}: no file here ends in {', '.join(SUFFIXES)}")
    return files


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def read(path: Path, render: Render, piece: int = PIECE) -> Iterator[Document]:
    """The documents of one file: rows of .jsonl, .json and .parquet; any other file is text, in parts of `piece`.

    Raises UserError where the file is not what its name says, or not UTF-8.
    """
    try:
        if path.suffix in (".jsonl", ".json"):
            yield from (render(row, f"{path}, row {number}") for number, row in enumerate(_json_rows(path), start=1))
        elif path.suffix == ".parquet":
            yield from (render(row, f"{path}, row {number}") for number, row in enumerate(_parquet_rows(path), start=1))
        else:
            yield from _pieces(path, piece)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 ({error.reason}): convert it, for example: iconv -f latin1 -t utf-8 {path.name}"
        ) from error


def _pieces(path: Path, piece: int) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        while lines := file.readlines(piece):
            yield "".join(lines)


def _json_rows(path: Path) -> Iterator[Row]:
    """One object per line, or one array of objects."""
    with path.open(encoding="utf-8-sig") as file:
        if path.suffix == ".json" and file.read(1) == "[":
            yield from _json_array(path)
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_object(line, f"{path}, line {number}")


def _json_array(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except JSON_ERRORS as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: not an array of objects")
    return list(rows)


def _json_object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except JSON_ERRORS as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object with named columns but {type(row).__name__}")
    return row


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a whole Parquet file: {_first_line(error)}") from error


def load_hub(name: str, path: str | None, subset: str | None, split: str, instead: str) -> Any:
    """A hub dataset, or a local folder of one, as a streaming `datasets.IterableDataset`.

    Raises UserError, which begins with the setting that asked for it (`name`), where the hub does not answer (within
    seconds), with what to use `instead`, or has no such dataset, subset or split.
    """
    from datasets import load_dataset
    from huggingface_hub import constants

    if path is None:
        raise UserError("data.path: a value is required: a dataset on the hub, for example HuggingFaceFW/fineweb-edu")
    if not Path(path).exists() and (constants.HF_HUB_OFFLINE or not hub_reachable(constants.ENDPOINT)):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
        raise UserError(f"{name}: {why}: use {instead}")
    try:
        return load_dataset(path, subset, split=split, streaming=True)
    except (OSError, ValueError) as error:  # no such dataset, no access; no such subset or split
        raise UserError(f"{name} data.subset={subset} data.split={split}: {_first_line(error)}") from error


def hub_reachable(endpoint: str, timeout: float = 5) -> bool:
    """Whether the hub answers at all. Its own client retries for 23 s before it says no."""
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=timeout).close()
    except HTTPError:
        return True  # an answer, though not the page
    except URLError as error:
        # A Python without root certificates of its own: the hub's client brings some.
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
