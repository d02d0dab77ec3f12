"""A position is one of a text, known by its content and by what makes text of it, not by the spelling of a path."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conversing import chatty
from kd_caches import make
from toyrun import toy_files

from wrinklefree.config.schema import DataConfig
from wrinklefree.core.errors import UserError
from wrinklefree.data import identity
from wrinklefree.data.kd_cache.manifest import read_manifest
from wrinklefree.data.kd_cache.read import KDCache, KDStream
from wrinklefree.data.kd_cache.write import write_manifest
from wrinklefree.data.open import training_stream
from wrinklefree.data.packing import BatchStream
from wrinklefree.data.shuffled import ShuffledStream
from wrinklefree.data.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["some text of some words"], 300)
BEFORE = 25  # batches before the position


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for name in ("a", "b", "deep/c"):
        rows = [json.dumps({"text": f"{name} {i} of some words", "other": "x", "text2": f"{i}"}) for i in range(90)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "held.txt").write_text("held out")
    (tmp_path / "held2.txt").write_text("other")
    return folder


def stream(path: Any = None, tokenizer: Any = TOKENIZER, seed: int = 1, **values: Any) -> BatchStream:
    config = DataConfig(**({"source": "local", "path": path and str(path), "shuffle_buffer": 32} | values))
    return training_stream(config, tokenizer, batch_size=1, length=32, seed=seed)


def position(batches: BatchStream, before: int = BEFORE) -> dict[str, Any]:
    for _ in range(before):
        next(batches)
    state: dict[str, Any] = json.loads(json.dumps(batches.state_dict()))
    return state


def same_batches(one: BatchStream, other: BatchStream) -> bool:
    return all(torch.equal(next(one)["input_ids"], next(other)["input_ids"]) for _ in range(40))


@pytest.mark.parametrize("spelling", ["./texts", "texts/", "texts/../texts", "elsewhere", "link"])
def test_a_path_may_be_spelled_and_lie_otherwise(
    spelling: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = stream(texts)
    state = position(whole)
    shutil.copytree(texts, tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere" / "a.jsonl")
    (tmp_path / "link").symlink_to(texts)
    resumed = stream(spelling)
    resumed.load_state_dict(state)
    assert same_batches(resumed, whole)


CHANGES = {
    "renamed": (
        lambda folder: (folder / "b.jsonl").rename(folder / "z.jsonl"),
        r"data\.path=b\.jsonl \(.*, this run has z",
    ),
    "added": (
        lambda folder: (folder / "d.txt").write_text("more"),
        r"data\.path=no d\.txt, this run has d\.txt \(4 by",
    ),
    "removed": (lambda folder: (folder / "b.jsonl").unlink(), r"data\.path=b\.jsonl \(.*, this run has no b\.jsonl"),
    "longer": (
        lambda folder: (folder / "a.jsonl").write_text((folder / "a.jsonl").read_text() + "\n"),
        r"data\.path=a\.jsonl \((\d+) bytes, \w+\), this run has a\.jsonl \(\d+ bytes",
    ),
    "edited": (
        lambda folder: (folder / "a.jsonl").write_text((folder / "a.jsonl").read_text().replace("some", "same", 1)),
        r"data\.path=a\.jsonl \((\d+) bytes, \w+\), this run has a\.jsonl \(\1 bytes",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_files_are_named(name: str, texts: Path) -> None:
    change, message = CHANGES[name]
    state = position(stream(texts))
    change(texts)
    with pytest.raises(UserError, match=message) as caught:
        stream(texts).load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert "data.allow_changes=true" in str(caught.value)


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "text_column": ({}, {"text_column": "text2"}, "data.text_column='text', this run has 'text2'"),
    "format": ({}, {"format": "sharegpt"}, "data.format='plain', this run has 'sharegpt'"),
    "heldout_path": ({}, {"heldout_path": "held.txt"}, "data.heldout_path=None, this run has 1 files"),
    "another heldout_path": (
        {"heldout_path": "held.txt"},
        {"heldout_path": "held2.txt"},
        "data.heldout_path=held.txt (8 bytes, ",
    ),
    "tokenizer": ({}, {"tokenizer": chatty()}, ""),
    "seed": ({}, {"seed": 2}, "seed=1, this run has 2"),
    "shuffle_buffer": ({}, {"shuffle_buffer": 7}, "shuffle_buffer=32, this run has 7"),
    "enable_thinking": (
        {"format": "sharegpt"},
        {"format": "sharegpt", "enable_thinking": "both"},
        "data.enable_thinking=False, this run has 'both'",
    ),
    "mask_prompt": (
        {"format": "sharegpt"},
        {"format": "sharegpt", "mask_prompt": True},
        "data.mask_prompt=False, this run has True",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_changed_settings_are_named_with_both_values(
    name: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after, message = SETTINGS[name]
    monkeypatch.chdir(tmp_path)
    if name == "tokenizer":
        after = {"tokenizer": train_tokenizer(["entirely different letters"] * 9, 299)}
        message = "tokenizer="
    state = stream(texts, **before).state_dict()
    stream(texts, **before).load_state_dict(state)
    with pytest.raises(UserError) as caught:
        stream(texts, **after).load_state_dict(state)
    assert f"saved with {message}" in str(caught.value)


@pytest.mark.parametrize("setting", ["path", "subset", "split", "heldout_split"])
def test_a_dataset_is_its_id_subset_and_splits(setting: str, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        header = "---\nconfigs:\n"
        for subset in ("x", "y"):
            files = "".join(f"  - split: {name}\n    path: rows.jsonl\n" for name in ("train", "test", "dev"))
            header += f"- config_name: {subset}\n  data_files:\n{files}"
        (tmp_path / folder / "README.md").write_text(header + "---\n")
        (tmp_path / folder / "rows.jsonl").write_text("".join(f'{{"text": "{folder} {i}"}}\n' for i in range(30)))
    values = {"source": "hub", "path": str(tmp_path / "one"), "subset": "x", "split": "train", "heldout_split": "test"}
    other = {"path": str(tmp_path / "two"), "subset": "y", "split": "dev", "heldout_split": "dev"}
    state = position(stream(**values), 3)
    stream(**values).load_state_dict(state)
    with pytest.raises(UserError, match=rf"saved with data\.{setting}=") as caught:
        stream(**values | {setting: other[setting]}).load_state_dict(state)
    assert str(caught.value).count("this run has") == 1


def test_texts_that_need_no_file_are_known_by_content(monkeypatch: pytest.MonkeyPatch) -> None:
    state = stream(source="stdlib").state_dict()
    stream(source="stdlib").load_state_dict(state)
    monkeypatch.setattr("wrinklefree.data.stdlib.documents", lambda split, tests: iter(["another Python"]))
    with pytest.raises(UserError, match=r"saved with data\.text="):
        stream(source="stdlib").load_state_dict(state)


def test_large_files_are_read_in_parts(tmp_path: Path) -> None:
    large = tmp_path / "large.bin"
    with large.open("wb") as file:
        file.truncate(1 << 33)  # 8 GB of nothing
    before = identity.file_identity(large)
    for place in (0, (1 << 33) - 1):
        with large.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        os.utime(large, ns=(place + 1, place + 1))
        assert identity.file_identity(large) != before


@pytest.mark.parametrize("name", ["added", "longer", "edited"])
def test_an_allowed_change_after_the_place_keeps_it(name: str, texts: Path, said: list[str]) -> None:
    whole = stream(texts)
    state = position(whole)
    change, _ = CHANGES[name]
    change(texts)
    resumed = stream(texts, allow_changes=True)
    resumed.load_state_dict(state)
    assert {key: resumed.state_dict()[key] for key in ("chunk", "document", "offset")} == {
        key: state[key] for key in ("chunk", "document", "offset")
    }
    assert "data.allow_changes=true: the data position was saved with data.path=" in "".join(said)
    assert "begins anew" not in "".join(said)
    next(resumed)


@pytest.mark.parametrize(
    "after",
    [
        {"path": "other"},
        {"source": "stdlib", "path": None},
        {"format": "sharegpt", "enable_thinking": "all"},
        {"shuffle_buffer": 3},
        {"seed": 9},
        {"text_column": "text2"},
    ],
)
@pytest.mark.parametrize("before", [0, 3, BEFORE, 400])
def test_whatever_changes_an_allowed_resume_goes_on(
    after: dict[str, Any], before: int, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    rows = [
        {"text": f"new {i}", "messages": [{"role": "user", "content": "Q"}, {"role": "gpt", "content": f"A{i}"}]}
        for i in range(30)
    ]
    for name in ("other/b.jsonl", "texts/b.jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps(row | {"text2": "x"}) for row in rows))
    (texts / "a.jsonl").unlink()
    (texts / "deep" / "c.jsonl").unlink()
    first = stream(texts)
    state = position(first, before)
    resumed = stream(**({"path": texts, "allow_changes": True} | after))
    resumed.load_state_dict(state)
    assert resumed.state_dict()["epoch"] == state["epoch"]
    for _ in range(20):
        next(resumed)
    assert resumed.state_dict()["epoch"] >= state["epoch"]


def test_renamed_files_before_the_place_begin_the_pass_anew(texts: Path, said: list[str]) -> None:
    batches = stream(texts)
    state = position(batches, 150)
    assert state["chunk_start"]["file"] > 0
    (texts / "a.jsonl").rename(texts / "z.jsonl")
    resumed = stream(texts, allow_changes=True)
    resumed.load_state_dict(state)
    assert "its pass begins anew" in "".join(said)
    fresh = stream(texts)
    fresh.load_state_dict(fresh.state_dict() | {"epoch": state["epoch"]})
    assert same_batches(resumed, fresh)


def old_form(state: dict[str, Any], source: str) -> dict[str, Any]:
    """The state that version 0.1 would have saved."""
    old = {key: value for key, value in state.items() if key != "data"} | {"source": source}
    for key in ("skipped", "row") if "rows" in (old["chunk_start"] or {}) else ("skipped",):
        (old["chunk_start"] or {}).pop(key, None)
    return old


def test_a_position_of_version_0_1_is_compared_by_what_it_has(texts: Path) -> None:
    whole = stream(texts)
    state = old_form(position(whole), f"data.path={texts}")
    resumed = stream(texts)
    resumed.load_state_dict(state)
    assert same_batches(resumed, whole)
    with pytest.raises(UserError, match=f"saved with source='data.path={str(texts)[:10]}"):
        stream(f"{texts}/.").load_state_dict(state)
    with pytest.raises(UserError, match="saved with seed=1, this run has 2"):
        stream(texts, seed=2).load_state_dict(state)


# KD caches


def test_a_cache_is_known_by_its_answers_not_by_names(folder: Path, tmp_path: Path) -> None:
    """Written from another place, with every path spelled otherwise: the same teacher, text and answers."""
    shutil.copytree(folder / "toy", tmp_path / "toy")
    shutil.copytree(folder / "text", tmp_path / "text")
    make(tmp_path, tmp_path / "cache")
    here, there = KDCache(folder / "cache"), KDCache(tmp_path / "cache")
    assert here.manifest.key != there.manifest.key
    batches = KDStream(here, batch_size=3, seed=1)
    next(batches)
    other = KDStream(there, batch_size=3, seed=1)
    other.load_state_dict(json.loads(json.dumps(batches.state_dict())))
    assert torch.equal(next(other)["input_ids"], next(batches)["input_ids"])


def test_another_cache_is_refused_with_what_differs_or_allowed(folder: Path) -> None:
    batches = KDStream(KDCache(folder / "cache"), batch_size=3, seed=1)
    next(batches)
    state = batches.state_dict()
    with pytest.raises(UserError, match=r"saved with kd_cache\.topk=8, this run has 96"):
        KDStream(KDCache(folder / "full"), batch_size=3, seed=1).load_state_dict(state)
    allowed = KDStream(KDCache(folder / "full"), batch_size=3, seed=1, allow_changes=True)
    allowed.load_state_dict(state)
    assert torch.equal(next(allowed)["input_ids"], next(batches)["input_ids"])


def test_a_cache_position_of_version_0_1_is_compared_by_its_key(folder: Path) -> None:
    cache = KDCache(folder / "cache")
    batches = KDStream(cache, batch_size=3, seed=1)
    next(batches)
    old = {key: value for key, value in batches.state_dict().items() if "." not in key}
    resumed = KDStream(cache, batch_size=3, seed=1)
    resumed.load_state_dict(old | {"kd_cache": cache.manifest.key})
    assert torch.equal(next(resumed)["input_ids"], next(batches)["input_ids"])
    with pytest.raises(UserError, match="saved with kd_cache='0123', this run has"):
        resumed.load_state_dict(old | {"kd_cache": "0123"})


def test_an_unfinished_cache_goes_on_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_files(tmp_path)
    make(tmp_path, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    again = make(Path("."), tmp_path / "cache")
    assert again == read_manifest(tmp_path / "cache")
    (tmp_path / "text" / "07.txt").write_text("w1 w2 w3")
    with pytest.raises(UserError, match=r"holds a KD cache with data_fingerprint=|holds a KD cache with data\.path=07"):
        make(tmp_path, tmp_path / "cache")
    assert make(tmp_path, tmp_path / "cache", "data.allow_changes=true") == again


def test_an_unfinished_cache_of_version_0_1_goes_on_by_its_settings(tmp_path: Path) -> None:
    toy_files(tmp_path)
    made = make(tmp_path, tmp_path / "cache")
    settings = {key: value for key, value in made.data.items() if key not in ("identity", "bad_rows", "allow_changes")}
    old = dataclasses.replace(made, data=settings, data_fingerprint="of version 0.1")
    write_manifest(tmp_path / "cache", old)
    assert make(tmp_path, tmp_path / "cache") == old
    with pytest.raises(UserError, match=r"holds a KD cache with data\.shuffle_buffer=2048, not 7"):
        make(tmp_path, tmp_path / "cache", "data.shuffle_buffer=7")
    with pytest.raises(UserError, match="holds a KD cache with topk=8, not 9"):
        make(tmp_path, tmp_path / "cache", topk=9)


def test_a_batch_that_cannot_be_read_leaves_the_position_where_it_was() -> None:
    def batch(rows: list[int]) -> dict[str, torch.Tensor]:
        if broken:
            raise UserError("no such shard")
        return {"input_ids": torch.tensor(rows)}

    broken = False
    stream, whole = (ShuffledStream(7, batch, identity={}, batch_size=2, seed=0) for _ in range(2))
    for _ in range(10):
        broken = True
        with pytest.raises(UserError):
            next(stream)
        broken = False
        assert stream.state_dict() == whole.state_dict()
        assert torch.equal(next(stream)["input_ids"], next(whole)["input_ids"])
