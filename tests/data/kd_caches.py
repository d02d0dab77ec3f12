"""KD caches of the toy model on the toy text, for the tests of what writes, reads and trains on them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from wrinklefree.commands import cache as command
from wrinklefree.core import files
from wrinklefree.data.kd_cache import write
from wrinklefree.data.kd_cache.manifest import Manifest

LENGTH = 16
SIZES = {"topk": 8, "negatives": 0, "num_train": 40, "num_heldout": 6, "shard_size": 16}


def make(folder: Path, out: Path, *more: str, force: bool = False, **sizes: int) -> Manifest:
    """A cache of the toy model on the toy text."""
    given = ["data=local", f"data.path={folder / 'text'}", "training.batch_size=4", "training.precision=fp32", *more]
    config = command.settings(str(folder / "toy"), LENGTH, given)
    return command.write(config, out, force, **(SIZES | sizes))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def take(batches: Iterator[dict[str, Tensor]], num: int) -> list[Tensor]:
    return [next(batches)["input_ids"] for _ in range(num)]


class KilledError(Exception):
    """What stands for the end of the process."""


def dies_at(monkeypatch: pytest.MonkeyPatch, name: str, calls: int) -> None:
    """The function `name` of kd_cache.write or core.files raises at its call number `calls`, before doing anything."""
    places = [module for module in (write, command, files) if name in vars(module)]
    whole, seen = vars(places[0])[name], iter(range(calls))

    def dying(*args: Any, **kwargs: Any) -> Any:
        if next(seen, None) is None:
            raise KilledError
        return whole(*args, **kwargs)

    for module in places:
        monkeypatch.setattr(module, name, dying)
