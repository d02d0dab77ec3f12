"""What is known before a training: that its first rows are good, without reading the others, and how much there is."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from conversing import chatty
from transformers import PreTrainedTokenizerFast

from wrinklefree.config.schema import DataConfig
from wrinklefree.core.errors import UserError
from wrinklefree.data import packing, rows, sources, stdlib
from wrinklefree.data.open import training_rows
from wrinklefree.data.preview import preview, size_of
from wrinklefree.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(list(stdlib.documents("train", tests=False))[:40], vocab_size=1000)


def local(path: Path, **values: Any) -> DataConfig:
    return DataConfig(source="local", path=str(path), **values)


def write(path: Path, *texts: Any) -> Path:
    path.write_text("".join(f"{text}\n" if isinstance(text, str) else json.dumps(text) + "\n" for text in texts))
    return path


def good(count: int) -> list[dict[str, str]]:
    return [{"text": f"document {i}"} for i in range(count)]


def test_good_rows_are_nothing_to_say(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, said: list[str]) -> None:
    preview(local(write(tmp_path / "a.jsonl", *good(50))), tokenizer)
    preview(DataConfig(source="stdlib"), tokenizer, rows=40)
    preview(DataConfig(source="downstream", task="stdlib_kind"), tokenizer, rows=40)
    assert not said


def test_an_early_bad_row_is_raised(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", *good(60), "{oops", *good(60))
    with pytest.raises(UserError, match=r"a\.jsonl, line 61: not JSON.*data\.bad_rows=skip"):
        preview(local(path), tokenizer)
    with pytest.raises(UserError, match="line 61"):
        preview(local(write(tmp_path / "b.jsonl", *good(60)), heldout_path=str(path)), tokenizer)


def test_a_late_bad_row_is_not_looked_for(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    preview(local(write(tmp_path / "a.jsonl", *good(2000), "{oops")), tokenizer, rows=90)


def test_only_the_first_rows_are_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", *good(2000))
    hub = DataConfig(source="hub", path=str(tmp_path))
    for config in (local(path, heldout_path=str(path)), local(path), hub):
        seen: list[str] = []
        whole = sources.rendered
        monkeypatch.setattr(sources, "rendered", lambda *a, whole=whole, seen=seen: seen.append(a[2]) or whole(*a))
        preview(config, tokenizer, rows=64)
        monkeypatch.undo()
        assert 64 < len(seen) <= (128 if config.source == "local" else sources.HELDOUT_DOCUMENTS + 65)


def test_skipped_rows_are_counted_and_nothing_but_them_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, said: list[str]
) -> None:
    mixed = write(tmp_path / "a.jsonl", *good(30), "{oops", {"other": "x"}, *good(30))
    preview(local(mixed, bad_rows="skip", heldout_path=str(write(tmp_path / "h.jsonl", *good(3)))), tokenizer)
    (message,) = said
    assert "leaves out 2 of the first 62 rows; the first: " in message
    bad = write(tmp_path / "b.jsonl", *["{oops"] * 5000)
    with pytest.raises(UserError, match=r"every row is bad.*the first: .*line 1: not JSON"):
        preview(local(bad, bad_rows="skip"), tokenizer)


@pytest.mark.parametrize("text", ["", "only one"])
def test_no_text_is_said(text: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="no text to train on"):
        preview(local(write(tmp_path / "a.jsonl", {"text": text})), tokenizer)


def test_a_tokenizer_without_an_end_is_said(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no eos_token"):
        preview(local(write(tmp_path / "a.jsonl", *good(30))), bare)


def library(rows: bool) -> list[str]:
    """Text of very different lengths and kinds, in an order that is not random."""
    texts = list(stdlib.documents("train", tests=False))[:40]
    return [part for text in texts for part in text.split("\n\n")] if rows else texts


def files(kind: str, folder: Path) -> DataConfig:
    folder.mkdir()
    if kind == "jsonl":
        write(folder / "a.jsonl", *({"text": text, "id": i} for i, text in enumerate(library(True))))
    elif kind == "jsonl.gz":
        lines = "".join(json.dumps({"text": text}) + "\n" for text in library(True))
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    elif kind == "array":
        (folder / "a.json").write_text(json.dumps([{"text": text} for text in library(True)]))
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([{"text": text} for text in library(True)]), folder / "a.parquet")
    elif kind == "texts":
        for number, text in enumerate(library(False)):
            (folder / f"{number}.txt").write_text(text)
    elif kind == "text":
        (folder / "a.txt").write_text("\n".join(library(False)))
    elif kind == "chats":
        turns = [[{"from": "human", "value": "Q"}, {"from": "gpt", "value": text}] for text in library(True)[::4]]
        write(folder / "a.jsonl", *({"conversations": turn} for turn in turns))
        return local(folder, format="openhermes", enable_thinking="all")
    return local(folder)


def counted(config: DataConfig, tokenizer: Any) -> int:
    documents = list(training_rows(config, tokenizer).documents(None))
    return sum(document.shape[1] for document in packing.encode(tokenizer, documents))


KINDS = ["jsonl", "array", "parquet", "text", "chats"]


@pytest.mark.parametrize(
    ("kind", "budget"),
    [*((kind, budget) for kind in KINDS for budget in (4 << 20, 1 << 16)), ("jsonl.gz", 4 << 20), ("texts", 4 << 20)],
)
def test_the_size_of_files_is_known_within_a_fifth(
    kind: str, budget: int, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the whole file in the sample, and with a small part of it."""
    monkeypatch.setattr("wrinklefree.data.preview.SAMPLED_CHARACTERS", budget)
    monkeypatch.setattr(rows, "HEAD", 1 << 12)
    config = files(kind, tmp_path / "data")
    speaker = chatty() if kind == "chats" else tokenizer
    found = size_of(config, speaker)
    assert found is not None
    assert found.name == f"data.path={tmp_path / 'data'}"
    assert found.tokens == pytest.approx(counted(config, speaker), rel=0.2)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (DataConfig(source="stdlib"), "Python's standard library (data=stdlib)"),
        (DataConfig(source="downstream", task="stdlib_kind"), "data.task=stdlib_kind"),
    ],
)
def test_the_size_of_texts_in_memory_is_known_within_a_tenth(
    config: DataConfig, name: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = list(stdlib.documents("train", tests=False))[::6]
    monkeypatch.setattr(stdlib, "documents", lambda split, tests: some)
    found = size_of(config, tokenizer)
    assert found is not None
    assert found.name == name
    assert found.tokens == pytest.approx(counted(config, tokenizer), rel=0.1)


def test_rows_of_unequal_files_count_by_their_bytes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    draw = random.Random(0)
    texts = library(False)
    for number in range(25):
        text = "\n".join(draw.choices(texts, k=1 + number % 4))
        (tmp_path / f"{number:03}.txt").write_text(text)
    found = size_of(local(tmp_path), tokenizer)
    assert found is not None
    assert found.tokens == pytest.approx(counted(local(tmp_path), tokenizer), rel=0.2)


def test_a_streamed_dataset_has_no_known_size(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert size_of(DataConfig(source="hub", path="someone/something"), tokenizer) is None
    assert size_of(DataConfig(source="downstream", task="sst2"), tokenizer) is None
    with pytest.raises(UserError, match=r"data\.path=.*nothing: no such file or folder"):
        size_of(local(tmp_path / "nothing"), tokenizer)


def test_an_empty_file_has_no_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    found = size_of(local(write(tmp_path / "a.txt")), tokenizer)
    assert found is not None
    assert found.tokens == 0


def test_files_without_text_do_not_hide_others(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for number in range(20):  # every second one is empty
        (tmp_path / f"{number:02}.txt").write_text("some words to read\n" * 50 * (number % 2))
    size = size_of(local(tmp_path), tokenizer)
    assert size is not None
    assert size.tokens > 1000
