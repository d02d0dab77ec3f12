"""Datasets of the Hugging Face hub, read row by row without a download."""

import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from wrinklefree.core.errors import UserError
from wrinklefree.core.text import first_line
from wrinklefree.data.local_files import is_saved_dataset
from wrinklefree.data.rows import Row

SPLIT = re.compile(r"(?P<name>[\w.-]+)(?P<rows>\[(?P<first>\d+%?)?:(?P<last>\d+%?)?\])?")


def load_hub(name: str, path: str | None, subset: str | None, split: str, instead: str) -> Any:
    """Return a dataset of the hub, or of a local folder, as a streaming `datasets.IterableDataset`.

    `split` is the name of a split, or a part of one: `train[:1000]`, `train[90%:]`.
    Raises UserError, beginning with `name`, if the hub does not answer within seconds (and says what to use `instead`),
    or if there is no such dataset, subset or split.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants

    if path is None:
        raise UserError("data.path: a value is required: a dataset on the hub, for example HuggingFaceFW/fineweb-edu")
    if is_saved_dataset(Path(path)):
        raise UserError(f"{name}: a folder of save_to_disk: read it with data=local data.path={path}")
    where = f"{name} data.subset={subset} data.split={split}"
    part = SPLIT.fullmatch(split)
    if part is None:
        raise UserError(f"{where}: no split, and no part of one such as train[:1000] or train[10%:20%]")
    if not Path(path).exists() and (constants.HF_HUB_OFFLINE or not hub_reachable(constants.ENDPOINT)):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
        raise UserError(f"{name}: {why}: use {instead}")
    try:
        dataset = load_dataset(path, subset, split=part["name"], streaming=True)
    except (OSError, ValueError, DatasetsError) as error:  # no such dataset, no access; no such subset or split
        raise UserError(f"{where}: {first_line(error)}") from error
    return dataset if part["rows"] is None else _part(dataset, part, where)


def _part(dataset: Any, part: re.Match[str], where: str) -> Any:
    """Return the rows of a dataset that `train[FIRST:LAST]` names. Raises UserError if there are none."""
    info = (dataset.info.splits or {}).get(part["name"])
    total = info.num_examples if info is not None else None
    first = _row_number(part["first"] or "0", total, where)
    last = total if part["last"] is None else _row_number(part["last"], total, where)
    if last is not None and last <= first:
        raise UserError(f"{where}: no row in this part")
    rows = dataset.skip(first) if first else dataset
    return rows if last is None else rows.take(last - first)


def _row_number(text: str, total: int | None, where: str) -> int:
    """Return the row that `1000` or `10%` names. Raises UserError if the dataset does not say how many it has."""
    if not text.endswith("%"):
        return int(text)
    if not total:
        raise UserError(f"{where}: the dataset does not say how many rows it has: give row numbers, such as [:1000]")
    return round(int(text[:-1]) * total / 100)


def hub_rows(name: str, dataset: Any, done: int = 0) -> Iterator[Row]:
    """Yield the rows of a dataset. Raises UserError if it cannot be read on after row `done`, or if the hub is gone."""
    from datasets.exceptions import DatasetsError

    rows = iter(dataset)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except (DatasetsError, OSError, ValueError) as error:  # ValueError: pyarrow's errors, and broken JSON
            raise UserError(f"{name}: cannot be read after row {done}: {first_line(error)}") from error
        done += 1
        yield row


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
