"""One server and its client for several files of tests."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from serving import LONGEST, PROMPT, Process, served

from wrinklefree.core.method import QuantMethod, find
from wrinklefree.export.formats.packed import export_packed
from wrinklefree.generate.open import open_engine
from wrinklefree.models.load import load_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in ternary, untrained, packed."""
    out = tmp_path_factory.mktemp("serve") / "toy" / "packed"
    model, words = load_model("builtin:tiny", dtype=torch.float32)
    method = find("bitdistill")(name="bitdistill")
    assert isinstance(method, QuantMethod)
    ids = words(PROMPT, return_tensors="pt").input_ids
    export_packed(method.prepare(model), words, method, out, card="", force=False, batches=[{"input_ids": ids}])
    return out


@pytest.fixture(scope="session")
def process(folder: Path) -> Iterator[Process]:
    limits = {"prompt-tokens": LONGEST, "tokens": LONGEST, "concurrent": 4, "waiting": 300}
    with served(
        folder, "--threads", "1", *(word for k, v in limits.items() for word in (f"--max-{k}", str(v)))
    ) as made:
        yield made
        code, log = made.end(signal.SIGINT)
        assert code == 0
        assert all("in a request: ignored here and from now on" in line for line in log.splitlines()), log


@pytest.fixture(scope="module")
def client(process: Process) -> Iterator[OpenAI]:
    with process.client() as made:
        yield made


@pytest.fixture(scope="session")
def local(folder: Path) -> tuple[Any, Any]:
    """What `wf generate` would run on the folder."""
    model, words, _ = open_engine(str(folder), threads=1)
    return model, words
