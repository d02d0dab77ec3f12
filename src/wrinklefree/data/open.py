"""Opens the text or task that the `data` section names, as packed batches.

A batch holds `input_ids`, `labels` and `position_ids`, each int64 [batch, length]. Call a model with all three, without
`attention_mask`, and with `use_cache=False`: `packing.make_batch` says why.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from wrinklefree.config.schema import DataConfig
from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import UserError
from wrinklefree.core.find import DATA_FORMATS, find_module, find_named
from wrinklefree.core.fingerprint import fingerprint
from wrinklefree.data import chat, sources, stdlib, stdlib_kind, tasks
from wrinklefree.data.hub import load_hub
from wrinklefree.data.identity import Identity, files_identity, folder_identity
from wrinklefree.data.local_files import find_files
from wrinklefree.data.packing import BatchStream, encode, make_batch, pack, pack_alone, pack_whole, shorten, spread
from wrinklefree.data.sources import Document, Example, GoodRows, Source, Split
from wrinklefree.data.tokenizer import tokenizer_fingerprint

# Settings that only some sources read, with those sources. Set for any other source, they are an error.
_READ_BY = {
    "tests": ("stdlib",),
    "path": ("local", "hub", "downstream", "self"),
    "text_column": ("local", "hub"),
    "format": ("local", "hub"),
    "enable_thinking": ("local", "hub"),
    "mask_prompt": ("local", "hub"),
    "subset": ("hub",),
    "split": ("hub",),
    "heldout_split": ("hub",),
    "heldout_path": ("local", "downstream"),
    "task": ("downstream",),
    "bad_rows": ("local", "hub", "downstream"),
    **{f"self_{key}": ("self",) for key in ("tokens", "minutes", "length", "chat", "temperature", "top_p", "seed")},
}

UNWRITTEN = "auto"  # the path of text that the model of this run is still to write

# What decides which documents a setting gives, and how they are read; paths are compared by their content instead.
_IDENTITY = (
    *("source", "task", "tests", "subset", "split", "heldout_split"),
    *("text_column", "format", "enable_thinking", "mask_prompt"),
)


def training_stream(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    length: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> BatchStream:
    """Return shuffled batches of the training documents, without end, for process `rank` of `world_size`.

    Raises UserError if the source does not read a setting, or cannot be opened. Errors in its content are raised with
    the first batch.
    """
    return BatchStream(
        training_rows(config, tokenizer),
        partial(encode, tokenizer),
        identity=_identity(config, tokenizer),
        allow_changes=config.allow_changes,
        batch_size=batch_size,
        length=length,
        seed=seed,
        rank=rank,
        world_size=world_size,
        shuffle_buffer=config.shuffle_buffer,
        document_mask=config.document_mask,
        pad=tokenizer.eos_token_id if config.source == "downstream" else None,
        alone=tokenizer.eos_token_id if config.rows == "one_document" else None,
    )


def heldout_batches(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    length: int,
    max_tokens: int | None = None,
) -> list[Batch]:
    """Return the held-out documents as batches, the same at every call. The last batch may be smaller.

    `max_tokens` keeps fewer blocks, spread evenly over all documents.
    Raises UserError if the source does not read a setting, cannot be opened, has a bad row, or has nothing held out.
    """
    source = heldout_rows(config, tokenizer)
    first = sources.HELDOUT_DOCUMENTS if _may_be_endless(config) else None
    texts = list(islice(source.documents(None), first))
    if not texts:
        raise UserError(f"{source.name}: no text to evaluate on{source.hint}")
    fill = pack_whole if config.source == "downstream" else pack
    if config.rows == "one_document":
        fill = _each_shortened if config.source == "downstream" else pack_alone
    alone = config.rows == "one_document"
    return _batches(texts, tokenizer, batch_size, length, max_tokens, config.document_mask, fill, alone)


def _each_shortened(documents: Iterable[Tensor], length: int, pad: int) -> Tensor:
    return pack_alone((shorten(document, length) for document in documents), length, pad)


def heldout_examples(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Return all held-out examples that have a fixed set of answers; an empty list if the data is no task."""
    if config.source != "downstream":
        return []
    documents = heldout_rows(config, tokenizer).documents(None)
    return [example for example in documents if isinstance(example, Example) and example.choices]


def file_batches(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    length: int,
    max_tokens: int | None = None,
) -> list[Batch]:
    """Return a file as batches.

    A text file is one document. A file of rows (see data/rows.py) holds one per row, in the column `text`.
    Raises UserError if there is no such file, or no text in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: a folder, not a file" if path.is_dir() else f"{path}: no such file")
    rows = sources.read_documents(path, _render("plain", chat.Reading(tokenizer)), piece=-1)
    texts = [text for text in rows if not sources.is_blank(text)]
    if not texts:
        raise UserError(f"{path}: no text to evaluate on")
    return _batches(texts, tokenizer, batch_size, length, max_tokens, document_mask=True)


def _batches(
    texts: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    length: int,
    max_tokens: int | None,
    document_mask: bool,
    fill: Callable[[Iterable[Tensor], int, int], Tensor] = pack,
    alone: bool = False,
) -> list[Batch]:
    blocks = fill(encode(tokenizer, texts), length, tokenizer.eos_token_id)
    kept = spread(blocks, max_tokens)
    return [make_batch(kept[i : i + batch_size], document_mask, alone) for i in range(0, len(kept), batch_size)]


class _Rows(NamedTuple):
    """Where a dataset's rows are, and how a row becomes a document."""

    name: str  # for error messages, and to recognize the data at a resume
    render: sources.Render
    path: str | None
    subset: str | None
    split: str
    heldout_split: str | None
    instead: str  # what to use if the hub does not answer


def _rows(config: DataConfig, tokenizer: PreTrainedTokenizerBase, thinking: chat.Thinking) -> _Rows:
    """Return where the rows of a local file, a hub dataset or a downstream task are, and how they become documents."""
    if config.source != "downstream":
        reading = chat.Reading(tokenizer, config.text_column, thinking, config.mask_prompt)
        render = _render(config.format, reading)
        name = f"data.path={config.path}"
        if config.format != "plain":
            name += f" data.format={config.format} data.enable_thinking={config.enable_thinking}"
        instead = "data=stdlib, or data=local data.path=FILE_OR_FOLDER"
        return _Rows(name, render, config.path, config.subset, config.split, config.heldout_split, instead)
    task = tasks.find_task(config.task)
    name = f"data.task={task.name} data.path={config.path or task.path}"
    instead = f"task={stdlib_kind.NAME}, or data.path=FILE_OR_FOLDER with the columns of {task.name}"
    render = partial(tasks.render, task)
    return _Rows(name, render, config.path or task.path, task.subset, task.train, task.heldout, instead)


def training_rows(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> GoodRows:
    """Return the training documents without bad rows. Raises UserError as `training_stream` does."""
    _refuse_unread(config)
    variants = [_training_variant(config, tokenizer, thinking) for thinking in chat.VARIANTS[config.enable_thinking]]
    return GoodRows(together(variants), skip=config.bad_rows == "skip")


def heldout_rows(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> GoodRows:
    """Return the held-out documents without bad rows. Raises UserError as `heldout_batches` does."""
    _refuse_unread(config)
    variants = [_heldout_variant(config, tokenizer, thinking) for thinking in chat.VARIANTS[config.enable_thinking]]
    return GoodRows(together(variants), skip=config.bad_rows == "skip")


def _identity(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Identity:
    """Return what makes text of the training data, and the content of local files: what a resume compares.

    Raises UserError if a file cannot be read.
    """
    found: Identity = {f"data.{key}": vars(config)[key] for key in _IDENTITY}
    written_by = [tokenizer_fingerprint(tokenizer), tokenizer.chat_template]
    return found | _places(config) | {"tokenizer": fingerprint(written_by)}


def _places(config: DataConfig) -> Identity:
    """Return the id of a dataset, or the fingerprints of the files that stand for a path."""
    if config.source == "stdlib" or _is_builtin(config):
        return {}
    if not _is_local(config):
        path = config.path or tasks.find_task(config.task).path
        return {"data.path": folder_identity(Path(path)) if Path(path).is_dir() else path}
    paths = {"data.path": config.path, "data.heldout_path": config.heldout_path}
    named = {key: path for key, path in paths.items() if path or key == "data.path"}
    return {key: files_identity(str(path), find_files(key, path)) for key, path in named.items()}


def texts_in_memory(config: DataConfig) -> sources.Memory | None:
    """Return the training documents of a source that needs no files; None for others. Raises UserError like those."""
    _refuse_unread(config)
    if config.source == "stdlib":
        return _library("train", config.tests)
    return _builtin(config, "train") if _is_builtin(config) else None


def training_files(config: DataConfig) -> list[Path] | None:
    """Return the local files to train on, or None if there are none. Raises UserError if a path does not exist."""
    _refuse_unread(config)
    return find_files("data.path", config.path) if _is_local(config) else None


def trained_share(config: DataConfig) -> float:
    """Return how much of the local files is trained on; the rest is held out."""
    return 1.0 if config.heldout_path else 1 - 1 / sources.HOLDOUT_EVERY


def row_renders(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[sources.Render]:
    """Return the ways in which a row becomes a document: one, or several for conversations."""
    return [_rows(config, tokenizer, thinking).render for thinking in chat.VARIANTS[config.enable_thinking]]


def together(variants: list[Source]) -> Source:
    """Return one source that gives the documents of all, which have equally many."""
    return variants[0] if len(variants) == 1 else sources.Interleaved(variants)


def _training_variant(config: DataConfig, tokenizer: PreTrainedTokenizerBase, thinking: chat.Thinking) -> Source:
    if config.source == "stdlib":
        return _library("train", config.tests)
    if _is_builtin(config):
        return _builtin(config, "train")
    rows = _rows(config, tokenizer, thinking)
    if _is_local(config):
        files = find_files("data.path", rows.path)
        if config.heldout_path:
            return sources.Files(rows.name, files, rows.render)
        hint = " (the first document is held out): add text, or name a held-out file with data.heldout_path"
        return sources.Files(rows.name, files, rows.render, keep=lambda n: n % sources.HOLDOUT_EVERY != 0, hint=hint)
    stream = load_hub(rows.name, rows.path, rows.subset, rows.split, rows.instead)
    if rows.heldout_split:
        return sources.Hub(rows.name, stream, rows.render)
    hint = f" (the first {sources.HELDOUT_DOCUMENTS} documents are held out): name a split with data.heldout_split"
    return sources.Hub(rows.name, stream, rows.render, skip=sources.HELDOUT_DOCUMENTS, hint=hint)


def _heldout_variant(config: DataConfig, tokenizer: PreTrainedTokenizerBase, thinking: chat.Thinking) -> Source:
    if config.source == "stdlib":
        return _library("heldout", tests=False)
    if _is_builtin(config):
        return _builtin(config, "heldout")
    rows = _rows(config, tokenizer, thinking)
    if not _is_local(config):
        split = rows.heldout_split or rows.split
        stream = load_hub(rows.name, rows.path, rows.subset, split, rows.instead)
        return sources.Hub(rows.name, stream, rows.render)
    if config.heldout_path:
        files = find_files("data.heldout_path", config.heldout_path)
        return sources.Files(f"data.heldout_path={config.heldout_path}", files, rows.render)
    files = find_files("data.path", rows.path)
    return sources.Files(rows.name, files, rows.render, keep=lambda n: n % sources.HOLDOUT_EVERY == 0)


def _is_builtin(config: DataConfig) -> bool:
    return config.source == "downstream" and config.task in tasks.BUILTIN


def _builtin(config: DataConfig, split: Split) -> sources.Memory:
    assert config.task is not None
    return sources.Memory(f"data.task={config.task}", tasks.BUILTIN[config.task](split))


def _may_be_endless(config: DataConfig) -> bool:
    """Whether the held-out documents could be very many, so that only the first ones are read."""
    return config.heldout_path is None and config.source != "stdlib" and not _is_builtin(config)


def _is_local(config: DataConfig) -> bool:
    return config.source in ("local", "self") or (config.source == "downstream" and config.path is not None)


def is_unwritten(config: DataConfig) -> bool:
    """Whether this is text that the model of the run is still to write (`data=self`)."""
    return config.source == "self" and config.path == UNWRITTEN


def check_written(config: DataConfig) -> None:
    """Raises UserError for text that a model is still to write."""
    if is_unwritten(config):
        raise UserError(
            "data=self: there is no text yet: only the training of a pretrained model, or `wf selftext`, writes it; "
            "here, name a file that it wrote with data.path=FILE"
        )


def _library(split: Split, tests: bool) -> sources.Memory:
    try:
        return sources.Memory("data=stdlib" + " with tests" * tests, stdlib.documents(split, tests))
    except ValueError as error:
        raise UserError(f"data=stdlib: {error}") from error


def _refuse_unread(config: DataConfig) -> None:
    """Raises UserError if a setting would have no effect, or if the text is not written yet."""
    check_written(config)
    defaults = type(config)(source=config.source)
    for key, readers in _READ_BY.items():
        value = vars(config)[key]
        if config.source not in readers and value != vars(defaults)[key]:
            raise UserError(f"data.{key}={value} has no effect with data.source={config.source}: leave it out")
    for key in ("enable_thinking", "mask_prompt", "text_column"):
        value = vars(config)[key]
        if value != vars(defaults)[key] and key not in _read_by_format(config.format):
            raise UserError(f"data.{key}={value} has no effect with data.format={config.format}: leave it out")
    if _is_builtin(config) and config.path is not None:
        raise UserError(f"data.path={config.path} has no effect with task={config.task}: leave it out")
    if config.source == "downstream" and config.heldout_path is not None and config.path is None:
        raise UserError(f"data.heldout_path={config.heldout_path} has no effect without data.path: leave it out")


def _read_by_format(name: str) -> tuple[str, ...]:
    """Return the settings that a data format reads, as its file states in `READS`."""
    reads: tuple[str, ...] = vars(find_module(DATA_FORMATS, name)).get("READS", ())
    return reads


def _render(format: str, reading: chat.Reading) -> sources.Render:
    document = find_named(DATA_FORMATS, format)
    return lambda row, where: document(row, reading, where)
