"""Looks at the training text before the training: are its first rows good, and how large is it?"""

import logging
import random
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from wrinklefree.config.schema import DataConfig
from wrinklefree.core.errors import UserError
from wrinklefree.data.open import (
    heldout_rows,
    is_unwritten,
    row_renders,
    texts_in_memory,
    trained_share,
    training_files,
    training_rows,
)
from wrinklefree.data.packing import ENCODED_TOGETHER, encode
from wrinklefree.data.rows import BadRowError, open_rows
from wrinklefree.data.sources import Document, Example, GoodRows, Item, Render, is_blank, rendered

log = logging.getLogger("wrinklefree")

ROWS = 1000
GLANCE = 1024  # characters of a document that are tokenized

# A sample of the text is enough to tell how many tokens there are.
SAMPLED_FILES = 8
SAMPLED_CHARACTERS = 4 << 20  # of each file; less would be about as much as is read ahead
SAMPLED_PARTS = 128  # of documents, that are tokenized
PART = 4096  # characters


def preview(config: DataConfig, tokenizer: PreTrainedTokenizerBase, rows: int = ROWS) -> None:
    """Read, write as text and tokenize the first rows to train on, and the first held out.

    With data.bad_rows=skip, log how many of them are bad.
    Raises UserError if there is nothing to read, if a row is bad, or if all are and are skipped.
    """
    skip = config.bad_rows == "skip"
    _look("train on", training_rows(config, tokenizer), tokenizer, rows, skip)
    of_its_own = config.heldout_path or config.heldout_split or (config.source == "downstream" and not config.path)
    # Otherwise the rows held out are among those that were read: it is enough that there is one.
    _look("hold out", heldout_rows(config, tokenizer), tokenizer, rows if of_its_own else 1, skip)


def _look(to: str, source: GoodRows, tokenizer: PreTrainedTokenizerBase, rows: int, skip: bool) -> None:
    good, bad = 0, list[BadRowError]()
    items = (_beginning(item) for item in islice(source.every(None), rows))
    while group := list(islice(items, ENCODED_TOGETHER)):
        bad += [item for item in group if isinstance(item, BadRowError)]
        if bad and not skip:
            raise source.refusal(bad[0])
        good += len(encode(tokenizer, [item for item in group if not isinstance(item, BadRowError)]))
    if not good and bad:
        raise UserError(f"{source.name}: every row is bad, so there is nothing to {to}; the first: {bad[0]}")
    if not good:
        raise UserError(f"{source.name}: no text to {to}{source.hint}")
    if bad:
        told = (source.name, len(bad), good + len(bad), bad[0])
        log.warning("%s: data.bad_rows=skip leaves out %d of the first %d rows; the first: %s", *told)


def _beginning(item: Item) -> Item:
    if isinstance(item, Example):
        return Example(item.prompt[:GLANCE], item.answer[:GLANCE])
    return item[:GLANCE] if isinstance(item, str) else item


class Size(NamedTuple):
    """How much text one pass over the training data has."""

    name: str  # of the text, for a reader
    tokens: int  # about


def size_of(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Size | None:
    """Estimate the tokens of one pass over the training data, from a sample. None if the data is streamed.

    Raises UserError as `training_stream` does.
    """
    if is_unwritten(config):
        return Size("what the model writes itself (data=self)", round(trained_share(config) * config.self_tokens))
    texts = texts_in_memory(config)
    if texts is not None:
        whole = [_text(document) for document in texts.texts]
        name = f"Python's standard library ({texts.name})" if config.source == "stdlib" else texts.name
        return Size(name, _estimate(tokenizer, whole, sum(map(len, whole)), len(whole)))
    found = training_files(config)
    if found is None:
        return None
    files = [file for file in found if file.stat().st_size] or found
    sizes = [file.stat().st_size for file in files]
    step = -(-len(files) // SAMPLED_FILES)
    samples = [_sample(file, row_renders(config, tokenizer)) for file in files[::step]]
    share = trained_share(config) * sum(sizes) / max(1, sum(sizes[::step]))
    characters = share * sum(sample.characters for sample in samples)
    documents = share * sum(sample.documents for sample in samples)
    read = [text for sample in samples for text in sample.texts]
    return Size(f"data.path={config.path}", _estimate(tokenizer, read, characters, documents))


class _Sample(NamedTuple):
    """The beginning of a file, and what the whole file has if it goes on like this."""

    texts: list[str]
    characters: float
    documents: float


def _sample(path: Path, renders: list[Render]) -> _Sample:
    texts: list[str] = []
    seen = 0
    with open_rows(path) as rows:
        for row in rows.rows:
            items = [row] if isinstance(row, str | BadRowError) else [rendered(render, row, "") for render in renders]
            new = {_text(item) for item in items if not isinstance(item, BadRowError) and not is_blank(item)}
            texts += sorted(new)
            seen += sum(map(len, new))
            if seen > SAMPLED_CHARACTERS:
                break
        share = rows.share()
    return _Sample(texts, seen / share, len(texts) / share)


def _text(document: Document) -> str:
    return document if isinstance(document, str) else document.prompt + document.answer


def _estimate(tokenizer: PreTrainedTokenizerBase, texts: list[str], characters: float, documents: float) -> int:
    """Estimate the tokens of so many characters and documents of text like `texts`, ends of documents included."""
    if not texts:
        return 0
    draw = random.Random(0)
    # A long document is as likely to be drawn as it has characters, and any part of it.
    chosen = draw.choices(texts, weights=[len(text) for text in texts], k=SAMPLED_PARTS)
    parts = [text[(start := draw.randrange(max(1, len(text) - PART))) : start + PART] for text in chosen]
    tokens = sum(document.shape[1] - 1 for document in encode(tokenizer, parts))
    return round(characters * tokens / sum(map(len, parts)) + documents)
