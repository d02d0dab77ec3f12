"""What several files of tests read."""

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
