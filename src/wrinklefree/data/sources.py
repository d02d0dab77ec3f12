"""Sources of documents: memory, local files, the Hugging Face hub.

A source yields its documents in one fixed order and can continue from any position. `packing.BatchStream` shuffles.

| source | held out |
|---|---|
| stdlib | its own split, by file |
| local | the file that the config names, or else every 20th document, of which at most 512 are used |
| hub | the first 512 documents of the split that the config names, or else of the training split |
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
from wrinklefree.core.text import first_line


class Example(NamedTuple):
    """A question and its answer. The text is `prompt + answer`, and only the answer is learned."""

    prompt: str
    answer: str  # with the space before it
    choices: tuple[str, ...] = ()  # all possible answers, if there is a fixed set


Split = Literal["train", "heldout"]

Document = str | Example
Position = dict[str, Any]
Row = Mapping[str, Any]
Render = Callable[[Row, str], Document]  # (a row, its place for error messages) -> its text

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".parquet")

HOLDOUT_EVERY = 20
# About 0.5 M tokens of ordinary documents: enough for a figure, tokenized in seconds, even if the dataset is terabytes.
HELDOUT_DOCUMENTS = 512
# ValueError: broken JSON, or a number with thousands of digits. RecursionError: thousands of nested lists.
JSON_ERRORS = (ValueError, RecursionError)
# Text files are cut at the first line end after so many characters, so that parts of a book are shuffled and held out.
PIECE = 32768


def is_blank(document: Document) -> bool:
    """Whether a document has nothing to learn: an empty text, or an example with an empty answer."""
    return not (document if isinstance(document, str) else document.answer).strip()


class Source(Protocol):
    """Documents in a fixed order."""

    name: str  # the setting that names it; for error messages, and to recognize it at a resume
    hint: str  # appended to the error message if the source is empty

    def documents(self, start: Position | None) -> Iterator[Document]:
        """Yield the documents from `start` (None: the first) to the last, once."""

    def position(self) -> Position:
        """Return the position just after the last document that `documents` yielded, in plain values."""


class Memory:
    """Documents in memory."""

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
    """Documents of local files, one file after the other. `keep` chooses them by their running number."""

    def __init__(
        self, name: str, paths: list[Path], render: Render, keep: Callable[[int], bool] = lambda _: True, hint: str = ""
    ):
        self.name, self.hint = name, hint
        self._paths, self._render, self._keep = paths, render, keep
        self._position = {"file": 0, "row": 0, "document": 0}

    def documents(self, start: Position | None) -> Iterator[Document]:
        at = self._position = dict(start or {"file": 0, "row": 0, "document": 0})
        while at["file"] < len(self._paths):
            for text in islice(read_documents(self._paths[at["file"]], self._render), at["row"], None):
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
        # Load a state even at the start, because otherwise `datasets` continues from the last state it was given.
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
    """Several sources with equally many documents: yields one from each in turn, leaving out repeats within a turn."""

    def __init__(self, sources: list[Source]):
        self.name, self.hint = sources[0].name, sources[0].hint
        self._sources = sources
        self._turn: list[Position | None] = [None] * len(sources)  # positions before this turn
        self._given = 0  # documents of this turn that are done

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


# Columns by which the format of a row is known, for advice.
FORMATS: dict[str, set[str]] = {
    "dolly": {"instruction", "context", "response"},
    "alpaca_chat": {"instruction", "output"},
    "sharegpt": {"conversations"},
}


def fitting_format(row: Row) -> str:
    """Advice for a row whose columns are those of another data format; "" if no format has them."""
    return next((f"set data.format={name}" for name, columns in FORMATS.items() if columns <= row.keys()), "")


def row_text(row: Row, where: str, column: str, chat: Callable[[Row, str], str]) -> str:
    """Return the text of a row: its `column`, or if it has none, its `messages`, which `chat` writes as text.

    Raises UserError if the row has neither (naming its columns), or if the column does not hold text.
    """
    if column not in row:
        if "messages" in row:
            return chat(row, where)
        advice = fitting_format(row) or f"set data.text_column to one of: {', '.join(map(str, row))}"
        raise UserError(f"{where}: no column {column!r}; {advice}")
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: column {column!r} holds {type(text).__name__}, not text: set data.text_column")
    return text


def find_files(setting: str, path: str | None) -> list[Path]:
    """Return the file `path`, or all files in the folder `path` that end in one of `SUFFIXES`, sorted by POSIX path.

    Hidden files are left out. Raises UserError, beginning with the key `setting`, if there is no such file.
    """
    if path is None:
        raise UserError(f"{setting}: a value is required: a file or folder of {', '.join(SUFFIXES)}")
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"{setting}={path}: no such file or folder")
    relative = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.suffix in SUFFIXES)
    files = [root / name for name in relative if not _is_hidden(name) and (root / name).is_file()]
    if not files:
        raise UserError(f"{setting}={path}: no file here ends in {', '.join(SUFFIXES)}")
    return files


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def read_documents(path: Path, render: Render, piece: int = PIECE) -> Iterator[Document]:
    """Yield the documents of one file: the rows of .jsonl, .json or .parquet, else text in parts of `piece` characters.

    Raises UserError if the file is not what its suffix says, or not UTF-8.
    """
    # The library `datasets` could do this, but it logs lines of its own before it raises, does not say in which line a
    # JSON file is broken, and takes 0.8 s to import.
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
    """Yield the objects of a file that has one per line, or that is one array of them."""
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
        raise UserError(f"{path}: not a whole Parquet file: {first_line(error)}") from error


def load_hub(name: str, path: str | None, subset: str | None, split: str, instead: str) -> Any:
    """Return a dataset of the hub, or of a local folder, as a streaming `datasets.IterableDataset`.

    Raises UserError, beginning with `name`, if the hub does not answer within seconds (and says what to use `instead`),
    or if there is no such dataset, subset or split.
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
        raise UserError(f"{name} data.subset={subset} data.split={split}: {first_line(error)}") from error


def hub_reachable(endpoint: str, timeout: float = 5) -> bool:
    """Whether the hub answers at all, within `timeout` seconds."""
    try:  # the hub's own client would retry for 23 s
        urlopen(Request(endpoint, method="HEAD"), timeout=timeout).close()
    except HTTPError:
        return True  # an error page is an answer
    except URLError as error:
        # This Python has no root certificates, but the hub's client brings its own.
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True
