"""Sources of documents: memory, local files, the Hugging Face hub.

A source yields its documents in one fixed order and can continue from any position. `packing.BatchStream` shuffles.

| source | held out |
|---|---|
| stdlib | its own split, by file |
| local, self | the file that the config names, or else every 20th document, of which at most 512 are used |
| hub | the first 512 documents of the split that the config names, or else of the training split |
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from wrinklefree.core.errors import UserError
from wrinklefree.core.fingerprint import fingerprint
from wrinklefree.core.text import without_surrogates
from wrinklefree.data.hub import hub_rows
from wrinklefree.data.rows import PIECE, BadRowError, EveryRowError, read_rows
from wrinklefree.data.rows import Row as Row  # for the files of data formats, a user's too

log = logging.getLogger("wrinklefree")


class Example(NamedTuple):
    """A question and its answer. The text is `prompt + answer`, and only the answer is learned."""

    prompt: str
    answer: str  # with the space before it
    choices: tuple[str, ...] = ()  # all possible answers, if there is a fixed set


Split = Literal["train", "heldout"]

Document = str | Example
Item = Document | BadRowError
Position = dict[str, Any]
Render = Callable[[Row, str], Document]  # (a row, its place for error messages) -> its text

HOLDOUT_EVERY = 20
# About 0.5 M tokens of ordinary documents: enough for a figure, tokenized in seconds, even if the dataset is terabytes.
HELDOUT_DOCUMENTS = 512


def is_blank(document: Item) -> bool:
    """Whether a document has nothing to learn: an empty text, or an example with an empty answer."""
    if isinstance(document, BadRowError):
        return False
    return not (document if isinstance(document, str) else document.answer).strip()


class Source(Protocol):
    """Documents in a fixed order. A row that gives none is there as a `BadRowError`, held out or not."""

    name: str  # the setting that names it; for error messages, and to recognize it in positions of version 0.1
    hint: str  # appended to the error message if the source is empty

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of its content without reading files, to recognize it at a resume."""

    def documents(self, start: Position | None) -> Iterator[Item]:
        """Yield the documents from `start` (None: the first) to the last, once."""

    def position(self) -> Position:
        """Return the position just after the last document that `documents` yielded, in plain values."""


class Memory:
    """Documents in memory."""

    hint = ""

    def __init__(self, name: str, texts: Iterable[Document]):
        self.name = name
        self.texts = list(texts)
        self._next = 0

    @property
    def facts(self) -> dict[str, Any]:
        return {"data.text": fingerprint(self.texts)}

    def documents(self, start: Position | None) -> Iterator[Item]:
        self._next = start["document"] if start else 0
        while self._next < len(self.texts):
            self._next += 1
            yield self.texts[self._next - 1]

    def position(self) -> Position:
        return {"document": self._next}


class Files:
    """Documents of local files, one file after the other. `keep` chooses them by their running number."""

    def __init__(
        self, name: str, paths: list[Path], render: Render, keep: Callable[[int], bool] = lambda _: True, hint: str = ""
    ):
        self.name, self.hint, self.facts = name, hint, dict[str, Any]()
        self._paths, self._render, self._keep = paths, render, keep
        self._position = {"file": 0, "row": 0, "document": 0}

    def documents(self, start: Position | None) -> Iterator[Item]:
        at = self._position = dict(start or {"file": 0, "row": 0, "document": 0})
        while at["file"] < len(self._paths):
            for item in read_items(self._paths[at["file"]], self._render, first=at["row"]):
                at["row"] += 1
                if is_blank(item):
                    continue
                at["document"] += 1
                if isinstance(item, BadRowError) or self._keep(at["document"] - 1):
                    yield item
            at["file"], at["row"] = at["file"] + 1, 0

    def position(self) -> Position:
        return dict(self._position)


class Hub:
    """Rows of a streaming `datasets.IterableDataset`, without the first `skip` documents."""

    def __init__(self, name: str, dataset: Any, render: Render, skip: int = 0, hint: str = ""):
        self.name, self.hint = name, hint
        self._dataset, self._render, self._skip = dataset, render, skip
        self._seen = self._row = 0
        splits = {split: info.num_examples for split, info in (dataset.info.splits or {}).items()}
        self.facts = {"data.rows": splits}  # as the dataset's card counts them, if it does
        self._beginning = dataset.state_dict()

    def documents(self, start: Position | None) -> Iterator[Item]:
        # Load a state even at the start, because otherwise `datasets` continues from the last state it was given.
        self._dataset.load_state_dict(start["rows"] if start else self._beginning)
        self._seen = start["document"] if start else 0
        self._row = start["row"] if start and "row" in start else self._seen  # version 0.1 did not save it
        for row in hub_rows(self.name, self._dataset, self._row):
            self._row += 1
            item = rendered(self._render, row, f"{self.name}, row {self._row}")
            if is_blank(item):
                continue
            self._seen += 1
            if isinstance(item, BadRowError) or self._seen > self._skip:
                yield item

    def position(self) -> Position:
        return {"document": self._seen, "row": self._row, "rows": self._dataset.state_dict()}


class Interleaved:
    """Several sources with equally many documents: yields one from each in turn, leaving out repeats within a turn."""

    def __init__(self, sources: list[Source]):
        self.name, self.hint = sources[0].name, sources[0].hint
        self._sources = sources
        self._turn: list[Position | None] = [None] * len(sources)  # positions before this turn
        self._given = 0  # documents of this turn that are done

    @property
    def facts(self) -> dict[str, Any]:
        return self._sources[0].facts

    def documents(self, start: Position | None) -> Iterator[Item]:
        self._turn = start["turn"] if start else [None] * len(self._sources)
        self._given = start["given"] if start else 0
        streams = [source.documents(at) for source, at in zip(self._sources, self._turn, strict=True)]
        for turn in zip(*streams, strict=True):
            if self._given < len(turn) and (bad := _first_bad(turn)):  # one bad row, however many ways it is written
                self._given = len(turn)
                yield bad
            while self._given < len(turn):
                document, before = turn[self._given], turn[: self._given]
                self._given += 1
                if document not in before:
                    yield document
            self._turn, self._given = [source.position() for source in self._sources], 0

    def position(self) -> Position:
        return {"turn": self._turn, "given": self._given}


def _first_bad(items: Iterable[Item]) -> BadRowError | None:
    return next((item for item in items if isinstance(item, BadRowError)), None)


# Columns by which the format of a row is known, for advice.
FORMATS: dict[str, set[str]] = {
    "dolly": {"instruction", "response"},
    "alpaca_chat": {"instruction", "output"},
    "sharegpt": {"conversations"},
}


def fitting_format(row: Row) -> str:
    """Advice for a row whose columns are those of another data format; "" if no format has them."""
    return next((f"set data.format={name}" for name, columns in FORMATS.items() if columns <= row.keys()), "")


class GoodRows:
    """The good rows of a source. Its first bad row is raised, or with `skip` all bad rows are left out and counted."""

    def __init__(self, source: Source, skip: bool):
        self.name, self.hint = source.name, source.hint
        self._source, self._skip = source, skip
        self._here = self._most = 0  # skipped in this pass over the data, and in the pass that skipped most
        self._said = False

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of the content without reading files, to recognize it at a resume."""
        return self._source.facts

    @property
    def skipped(self) -> int:
        """How many bad rows were left out. A row counts once, however often the data is read."""
        return max(self._here, self._most)

    def documents(self, start: Position | None) -> Iterator[Document]:
        """Yield the good rows. Raises BadRowError at the first bad one, unless they are skipped."""
        self._most = self.skipped
        self._here = start.get("skipped", 0) if start else 0
        for item in self.every(start):
            if not isinstance(item, BadRowError):
                yield item
            elif self._skip:
                self._leave_out(item)
            else:
                raise self.refusal(item)

    def every(self, start: Position | None) -> Iterator[Item]:
        """Yield all rows, the bad ones too, without counting them."""
        return self._source.documents(start)

    def refusal(self, row: BadRowError) -> BadRowError:
        """Return the error for a bad row, which says what to do."""
        return BadRowError(f"{row}; mend it (a resume then needs data.allow_changes=true), or set data.bad_rows=skip")

    def position(self) -> Position:
        """Return the position just after the last good row, with the bad rows that were skipped before it."""
        return {**self._source.position(), "skipped": self._here}

    def _leave_out(self, row: BadRowError) -> None:
        self._here += 1
        if not self._said:
            log.warning("data.bad_rows=skip: leaves out %s", row)
            self._said = True


def read_items(path: Path, render: Render, piece: int = PIECE, first: int = 0) -> Iterator[Item]:
    """Yield the documents of one file from row `first` on, with a `BadRowError` for each row that gives none.

    Raises UserError if the file cannot be read on.
    """
    for number, row in enumerate(read_rows(path, piece), start=1):
        if number > first:
            yield row if isinstance(row, str | BadRowError) else rendered(render, row, f"{path}, row {number}")


def read_documents(path: Path, render: Render, piece: int = PIECE) -> Iterator[Document]:
    """Yield the documents of one file. Raises UserError at the first row that cannot be read."""
    for item in read_items(path, render, piece):
        if isinstance(item, BadRowError):
            raise item
        yield item


def rendered(render: Render, row: Row, where: str) -> Item:
    """Return the document of a row, or what is wrong with it. Raises EveryRowError if no row can be a document."""
    try:
        document = render(row, where)
    except EveryRowError:
        raise
    except UserError as error:
        return BadRowError(str(error))
    if isinstance(document, str):
        return without_surrogates(document)
    prompt, answer = without_surrogates(document.prompt), without_surrogates(document.answer)
    return document._replace(prompt=prompt, answer=answer)
