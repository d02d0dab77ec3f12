"""Damaged and foreign packed folders: whatever is in their files, the native loop reads them or says one line."""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batches, llama, tokenizer

from wrinklefree.core.errors import UserError
from wrinklefree.engine import source
from wrinklefree.engine.engine import Engine, supports
from wrinklefree.engine.sampling import Sampling
from wrinklefree.export.formats.packed import export_packed
from wrinklefree.methods.fairy2 import Config

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "packed"
    method = Config()
    trained = method.prepare(llama())
    export_packed(trained, tokenizer(), method, folder, card="", force=False, batches=batches(), head_bits=8)
    return folder


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """A file with some bytes of its header changed, a header of another length, or cut off."""
    data = bytearray(whole)
    header = 8 + int.from_bytes(whole[:8], "little")
    kind = rng.randrange(4)
    if kind == 0:
        data[:8] = rng.choice([0, 1, header, header - 9, 2**31, 2**63, 2**64 - 1, rng.randrange(2**20)]).to_bytes(
            8, "little"
        )
    elif kind == 1:
        del data[rng.randrange(len(data)) :]
    else:
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(8, header)] = rng.choice([rng.randrange(256), *b'0123456789[]{},:"'])
    return bytes(data)


def one_line(error: UserError) -> bool:
    """Always False, for "was not read", once the message is what it should be."""
    if "\n" in str(error):
        pytest.fail(f"more than one line: {error}")
    return False


def read_all(folder: Path) -> bool:
    """Whether every tensor of a folder could be read."""
    try:
        for file in source.open_files(folder):
            for name in file.keys():  # noqa: SIM118  # not a dict
                file.get_tensor(name)
    except UserError as error:
        return one_line(error)
    return True


def mutate_headers(folder: Path, scratch: Path, count: int, seed: int) -> int:
    """How many of `count` damaged files were refused."""
    whole = (folder / "model.safetensors").read_bytes()
    rng, refused = random.Random(seed), 0
    scratch.mkdir()
    for _ in range(count):
        (scratch / "model.safetensors").write_bytes(damaged(whole, rng))
        refused += not read_all(scratch)
    return refused


def test_damaged_headers_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    assert mutate_headers(folder, tmp_path / "scratch", 2000, seed=0) > 1000


@pytest.mark.slow
def test_a_hundred_thousand_damaged_headers(folder: Path, tmp_path: Path) -> None:
    assert mutate_headers(folder, tmp_path / "scratch", 100_000, seed=1) > 50_000


ODD: list[Any] = [None, -1, 0, 3, 2**31, 2**63, 1e300, True, "x", "", [], [1], {}, {"a": 1}]


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in nested lists and dictionaries."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def test_odd_values_in_a_config_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    """Of the packed layers' part of config.json: nothing is believed before it is compared with the files."""
    if supports(source.FolderSource(folder).config) is not None:
        pytest.skip("no native library")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    config = json.loads((folder / "config.json").read_text())
    rng = random.Random(0)
    ways = [p for p in places(config) if p[0] == "quantization_config" or p[0] in STATED]
    refused = 0
    for _ in range(250):
        changed = copy.deepcopy(config)
        *way, last = rng.choice(ways)
        place = changed
        for key in way:
            place = place[key]
        place[last] = rng.choice(ODD)
        (broken / "config.json").write_text(json.dumps(changed))
        try:
            list(Engine.from_folder(broken, threads=1).generate([1, 2, 3], Sampling(max_new_tokens=2)))
        except UserError as error:
            refused += not one_line(error)
    assert refused > 100


STATED = {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size", "head_dim"}
