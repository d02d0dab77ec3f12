"""What several files of tests read."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from kd_caches import make
from tiny import VOCAB
from toyrun import toy_files


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model, its text and `cache/` of both, with `full/` of the whole vocabulary and `random/` with negatives."""
    folder = tmp_path_factory.mktemp("kd")
    toy_files(folder)
    make(folder, folder / "cache")
    make(folder, folder / "full", topk=VOCAB)
    make(folder, folder / "random", negatives=20)
    return folder


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The program's warnings, once each, whatever other tests did to its logger."""

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    log, handler = logging.getLogger("wrinklefree"), Kept(logging.WARNING)
    log.addHandler(handler)
    yield messages
    log.removeHandler(handler)
