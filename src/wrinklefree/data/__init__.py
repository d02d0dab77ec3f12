"""Text to train and evaluate on, as packed batches.

A batch is `input_ids`, `labels` and `position_ids`, each int64 [batch, length]. Give a model all three, no
`attention_mask`, and `use_cache=False`: `packing.py` says why.
"""

from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from wrinklefree.core.errors import UserError
from wrinklefree.data import sources, stdlib
from wrinklefree.data.packing import IGNORE, Batch, BatchStream, encode, make_batch, pack, spread
from wrinklefree.data.sources import Source

if TYPE_CHECKING:
    from wrinklefree.config import DataConfig

__all__ = ["IGNORE", "Batch", "BatchStream", "file_batches", "heldout_batches", "training_stream"]

# The settings that only some sources read, and which.
_READ_BY = {
    "tests": ("stdlib",),
    "path": ("local", "hub"),
    "text_column": ("local", "hub"),
    "subset": ("hub",),
    "split": ("hub",),
    "heldout_split": ("hub",),
    "heldout_path": ("local",),
}


def training_stream(
    config: "DataConfig",
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    length: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> BatchStream:
    """Batches of the training documents without end, shuffled, for process `rank` of `world_size`.

    Raises UserError for a setting the source does not read, and where the source cannot be opened; what is wrong with
    its content comes with the first batch.
    """
    return BatchStream(
        _training_source(config, tokenizer),
        partial(encode, tokenizer),
        batch_size=batch_size,
        length=length,
        seed=seed,
        rank=rank,
        world_size=world_size,
        shuffle_buffer=config.shuffle_buffer,
        document_mask=config.document_mask,
    )


def heldout_batches(
    config: "DataConfig",
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    length: int,
    max_tokens: int | None = None,
) -> list[Batch]:
    """The held-out documents, packed; with `max_tokens` blocks spread evenly over all of them. The same at every call.

    The last batch may be smaller. Raises UserError as `training_stream` does, and where nothing is held out.
    """
    source = _heldout_source(config, tokenizer)
    texts = list(source.documents(None))
    if not texts:
        raise UserError(f"{source.name}: no text to evaluate on{source.hint}")
    return _batches(texts, tokenizer, batch_size, length, max_tokens, config.document_mask)


def file_batches(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    length: int,
    max_tokens: int | None = None,
    text_column: str = "text",
) -> list[Batch]:
    """A file, packed: a text file is one document, .jsonl, .json and .parquet have one per row.

    Raises UserError where there is no such file, or no text in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    rows = sources.read(path, _render(tokenizer, text_column), piece=-1)
    texts = [text for text in rows if text.strip()]
    if not texts:
        raise UserError(f"{path}: no text to evaluate on")
    return _batches(texts, tokenizer, batch_size, length, max_tokens, document_mask=True)


def _batches(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    length: int,
    max_tokens: int | None,
    document_mask: bool,
) -> list[Batch]:
    blocks = pack(encode(tokenizer, texts), length, pad=tokenizer.eos_token_id)
    kept = spread(blocks, max_tokens)
    return [make_batch(kept[i : i + batch_size], document_mask) for i in range(0, len(kept), batch_size)]


def _training_source(config: "DataConfig", tokenizer: PreTrainedTokenizerBase) -> Source:
    _refuse_unread(config)
    if config.source == "stdlib":
        return _library("train", config.tests)
    render = _render(tokenizer, config.text_column)
    name = f"data.path={config.path}"
    if config.source == "local":
        files = sources.find_files("data.path", config.path)
        if config.heldout_path:
            return sources.Files(name, files, render)
        hint = " (the first document is held out): add text, or name a held-out file with data.heldout_path"
        return sources.Files(name, files, render, keep=lambda n: n % sources.HOLDOUT_EVERY != 0, hint=hint)
    rows = sources.load_hub(config.path, config.subset, config.split)
    if config.heldout_split:
        return sources.Hub(name, rows, render)
    hint = f" (the first {sources.HELDOUT_DOCUMENTS} documents are held out): name a split with data.heldout_split"
    return sources.Hub(name, rows, render, skip=sources.HELDOUT_DOCUMENTS, hint=hint)


def _heldout_source(config: "DataConfig", tokenizer: PreTrainedTokenizerBase) -> Source:
    _refuse_unread(config)
    if config.source == "stdlib":
        return _library("heldout", tests=False)
    render = _render(tokenizer, config.text_column)
    if config.source == "hub":
        rows = sources.load_hub(config.path, config.subset, config.heldout_split or config.split)
        return _first(sources.Hub(f"data.path={config.path}", rows, render))
    if config.heldout_path:
        files = sources.find_files("data.heldout_path", config.heldout_path)
        return sources.Files(f"data.heldout_path={config.heldout_path}", files, render)
    files = sources.find_files("data.path", config.path)
    name = f"data.path={config.path}"
    return _first(sources.Files(name, files, render, keep=lambda n: n % sources.HOLDOUT_EVERY == 0))


def _first(source: Source) -> Source:
    """Its first documents: of a dataset that may be endless, enough to measure on."""
    return sources.Memory(source.name, islice(source.documents(None), sources.HELDOUT_DOCUMENTS))


def _library(split: stdlib.Split, tests: bool) -> Source:
    try:
        return sources.Memory("data=stdlib" + " with tests" * tests, stdlib.documents(split, tests))
    except ValueError as error:
        raise UserError(f"data=stdlib: {error}") from error


def _refuse_unread(config: "DataConfig") -> None:
    """A setting that has no effect is an error, not a silence."""
    defaults = type(config)(source=config.source)
    for key, readers in _READ_BY.items():
        value = vars(config)[key]
        if config.source not in readers and value != vars(defaults)[key]:
            raise UserError(f"data.{key}={value} has no effect with data.source={config.source}: leave it out")


def _render(tokenizer: PreTrainedTokenizerBase, column: str) -> sources.Render:
    return partial(sources.row_text, column=column, chat=partial(_chat, tokenizer))


def _chat(tokenizer: PreTrainedTokenizerBase, row: sources.Row, where: str) -> str:
    """A row's `messages`, a list of {role, content}, as text by the tokenizer's chat template."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise UserError(
            f"{where}: messages, but tokenizer {tokenizer.name_or_path!r} has no chat template to write them"
        )
    try:
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    except (TemplateError, TypeError) as error:
        raise UserError(
            f"{where}: messages must be a list of {{role, content}}; the chat template says: {error}"
        ) from error
