"""GGUF files whose headers say anything: a model comes of them, or one line."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ggufs import other, parts_of, tokenizer_of
from transformers import AutoModelForCausalLM

from wrinklefree.core.errors import UserError
from wrinklefree.core.method import find
from wrinklefree.export.formats import gguf as gguf_export
from wrinklefree.gguf.header import Header, read_header
from wrinklefree.models import gguf

pytest.importorskip("gguf", reason="needs the extra gguf")

ODD: list[Any] = [None, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 0.0, -1.0, 1e300, float("nan"), True, "x", "", [], [1], [[1]]]
NAMES = ("qwen2moe", "qwen3moe", "gemma2", "gemma3", "granite", "phi3", "starcoder2", "smollm3", "llama 3")


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Header]:
    tokenizer = tokenizer_of(parts_of())
    found = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp("gguf")
        method = find("bitdistill")(name="bitdistill", norm_mode="none", activation_bits=None)
        model = method.prepare(other(name, vocab_size=len(tokenizer), num_hidden_layers=2), [])
        gguf_export.write(model, tokenizer, folder, [], "tq1_0")
        found[name] = read_header(folder / "model.gguf")
    return found


def damaged(header: Header, rng: random.Random) -> Header:
    """With a setting or a tensor's shape or name changed."""
    metadata, tensors = dict(header.metadata), dict(header.tensors)
    for _ in range(rng.randrange(1, 3)):
        if rng.random() < 0.7:
            metadata[rng.choice(list(metadata))] = rng.choice(ODD)
            continue
        name = rng.choice(list(tensors))
        tensor = tensors.pop(name)
        if rng.random() < 0.5:
            tensors[name] = replace(tensor, shape=tuple(rng.sample(tensor.shape, len(tensor.shape))))
        elif rng.random() < 0.5:
            tensors[rng.choice([name.replace("weight", "bias"), "blk.9.ffn_up.weight", "rope_freqs.weight"])] = tensor
    return Header(header.file, metadata, tensors)


def read_all(headers: dict[str, Header], count: int, seed: int, monkeypatch: pytest.MonkeyPatch, cache: Path) -> int:
    """How many of `count` damaged headers were refused, each in one line."""
    rng, said = random.Random(seed), []
    monkeypatch.setenv("WRINKLEFREE_CACHE", str(cache))
    for _ in range(count):
        header = damaged(headers[rng.choice(NAMES)], rng)
        monkeypatch.setattr(gguf, "read_header", lambda file, header=header: header)
        try:
            folder = gguf.gguf_folder(header.file, rng.choice(["packed", "dense"]))
            with torch.no_grad():
                AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[3, 4, 5]]))
        except UserError as error:
            said.append(str(error))
    assert not [line for line in said if "\n" in line]
    return len(said)


def test_odd_settings_and_shapes_are_refused_in_one_line(
    headers: dict[str, Header], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert read_all(headers, 60, 0, monkeypatch, tmp_path) > 15


@pytest.mark.slow
def test_thousands_of_odd_headers(headers: dict[str, Header], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert read_all(headers, 1500, 1, monkeypatch, tmp_path) > 250
